"""The store of training: every population is made once and shared by all who ask for it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from distillens.core.checks import UserError
from distillens.core.config import describe
from distillens.core.storage import fingerprint, read_tensors, write_tensors
from distillens.core.vector import Shapes
from distillens.engine.plan import Plan
from distillens.engine.workers import Engine
from distillens.experts import Experts, Trajectories
from distillens.train import Population, Training, chunks, train_chunk

Report = Callable[[int, int], None]  # (models done, models in all)
Request = Training | Experts


class Runs:
    """Populations and expert trajectories by content: data, network, recipe, keys, plan, torch version.

    Trained chunks lie as safetensors in ``folder`` (in memory without one), each written whole or not at
    all, so that an interrupted request goes on where it stopped. ``limit`` bounds the folder in bytes: what was
    used longest ago goes first, never what this process has used. ``trained`` counts, for each model
    by identity, how often it was trained here.
    """

    def __init__(
        self, plan: Plan, engine: Engine | None = None, folder: Path | None = None, limit: int = 8 << 30
    ) -> None:
        self.plan = plan
        self.engine = engine or Engine(1, plan.threads)
        self.folder = folder
        self.limit = limit
        self.trained: Counter[str] = Counter()
        self._memory: dict[str, Population] = {}
        self._trajectories: dict[str, torch.Tensor] = {}
        self._used: set[Path] = set()

    def get(self, *trainings: Training, report: Report | None = None) -> list[Population]:
        """One population a training, made now where the store has none.

        All missing chunks of all trainings go to the engine together.
        """
        self.make(trainings, report=report)
        return [Population.joined([self._load(part) for part in chunks(t, self.plan)]) for t in trainings]

    def trajectories(self, experts: Experts, *, report: Report | None = None) -> Trajectories:
        """The experts' way, made now where the store has none that goes as far. Nothing of it is read yet."""
        self.make([experts], report=report)
        parts = experts.cut(self.plan)
        found = [self._find(part) for part in parts]
        params, _ = experts.net.init(experts.data, experts.keys[0])
        return Trajectories(
            experts.net,
            Shapes.of(params),
            experts.passes,
            tuple(part for part in found if part is not None),
            tuple(len(part.keys) for part in parts),
        )

    def make(self, requests: Iterable[Request], *, report: Report | None = None) -> None:
        """See that the store has these populations and experts, without reading them."""
        parts = list(self._missing(requests))
        jobs = [part.training if isinstance(part, Experts) else part for part in parts]
        total = sum(len(job.keys) for job in jobs)
        # Long jobs first: the workers end together.
        order = sorted(range(len(jobs)), key=lambda i: -jobs[i].image_steps)
        done = 0
        for place, population in self.engine.map(train_chunk, [(jobs[i], self.plan) for i in order]):
            part, job = parts[order[place]], jobs[order[place]]
            self._save(part, population)
            self.trained.update(job.identities())
            done += len(job.keys)
            if report is not None:
                report(done, total)
        if parts:
            self._shrink()

    def missing(self, requests: Iterable[Request]) -> list[Request]:
        """The chunks that ``make`` would train."""
        return list(self._missing(requests))

    def _missing(self, requests: Iterable[Request]) -> Iterator[Request]:
        requests = list(requests)
        asked: set[str] = set()
        for request in requests:
            if isinstance(request, Experts):
                continue
            for part in chunks(request, self.plan):
                name = self._name(part)
                if name in asked:
                    continue
                asked.add(name)
                if self.folder is None:
                    present = name in self._memory
                else:
                    present = self._path(name).is_file()
                    self._used.add(self._path(name))
                if not present:
                    yield part
        # Of experts that differ in length alone the longest serve all.
        experts = [part for r in requests if isinstance(r, Experts) for part in r.cut(self.plan)]
        for part in sorted(experts, key=lambda part: -part.passes):
            name = self._name(part)
            if name not in asked and self._find(part) is None:
                yield part
            asked.add(name)

    def _name(self, part: Request) -> str:
        # Experts of any length have one name: their shortest training's.
        what = part.lasting(1) if isinstance(part, Experts) else part
        return fingerprint(what.fingerprint, describe(self.plan), torch.__version__, part.data.device.type)

    def _find(self, part: Experts) -> Path | torch.Tensor | None:
        """Where these experts' trajectories lie, if any go as far."""
        name = self._name(part)
        if self.folder is None:
            known = self._trajectories.get(name)
            return None if known is None or known.shape[1] <= part.passes else known
        for path in sorted((self.folder / "experts").glob(f"{name[:40]}.*.safetensors")):
            if int(path.name.split(".")[1]) >= part.passes:
                self._used.add(path)
                path.touch()
                return path
        return None

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name[:2] / f"{name[2:40]}.safetensors"

    def _save(self, part: Request, population: Population) -> None:
        name = self._name(part)
        if isinstance(part, Experts):
            if self.folder is None:
                self._trajectories[name] = population.snapshots
                return
            # The length in its name, all digits: sorted names are sorted lengths.
            path = self.folder / "experts" / f"{name[:40]}.{part.passes:06d}.safetensors"
            write_tensors(path, {"snapshots": population.snapshots})
            self._used.add(path)
            return
        if self.folder is None:
            self._memory[name] = population
            return
        tensors = {"final": population.final, "snapshots": population.snapshots}
        tensors |= {f"seen.{n}": value for n, value in population.seen.items()}
        tensors |= {f"buffers.{n}": value for n, value in population.buffers.items()}
        about = {
            "moments": population.moments,
            "seen_moments": population.seen_moments,
            "names": population.shapes.names,
            "shapes": population.shapes.shapes,
        }
        write_tensors(self._path(name), tensors, {"about": json.dumps(about)})

    def _load(self, part: Training) -> Population:
        name = self._name(part)
        if self.folder is None:
            return self._memory[name]
        path = self._path(name)
        try:
            tensors, metadata = read_tensors(path)
            about = json.loads(metadata["about"])
        except (UserError, KeyError):
            # A damaged file is worth no more than none: it is made again.
            path.unlink(missing_ok=True)
            self.make([part])
            tensors, metadata = read_tensors(path)
            about = json.loads(metadata["about"])
        path.touch()
        return Population(
            part.net,
            Shapes(tuple(about["names"]), tuple(tuple(s) for s in about["shapes"])),
            tensors["final"],
            tuple(about["moments"]),
            tensors["snapshots"],
            tuple(about["seen_moments"]),
            {n[5:]: value for n, value in tensors.items() if n.startswith("seen.")},
            {n[8:]: value for n, value in tensors.items() if n.startswith("buffers.")},
        )

    def _shrink(self) -> None:
        if self.folder is None:
            return
        files = []
        for path in self.folder.glob("*/*.safetensors"):
            with suppress(FileNotFoundError):  # another process may be clearing up too
                about = path.stat()
                files.append((about.st_mtime, about.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                return
            if path not in self._used:
                path.unlink(missing_ok=True)
                total -= size
