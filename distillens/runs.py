"""The store of training: every population is made once and shared by all who ask for it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from distillens.core.checks import UserError
from distillens.core.config import describe
from distillens.core.storage import fingerprint, read_header, read_tensors, write_tensors
from distillens.core.vector import Shapes
from distillens.engine.cluster import Cluster
from distillens.engine.plan import Plan
from distillens.engine.workers import Engine
from distillens.experts import Experts, Trajectories
from distillens.stacks import together, train_stack
from distillens.train import Population, Training, assembled, chunks

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
        self,
        plan: Plan,
        engine: Engine | Cluster | None = None,
        folder: Path | None = None,
        limit: int = 8 << 30,
    ) -> None:
        self.plan = plan
        self.engine: Engine | Cluster = engine or Engine(1, plan.threads)
        self.folder = folder
        self.limit = limit
        self.trained: Counter[str] = Counter()
        self._memory: dict[str, Population] = {}
        self._trajectories: dict[str, torch.Tensor] = {}
        self._used: set[Path] = set()
        self._mapped: dict[Path, torch.Tensor] = {}

    def get(self, *trainings: Training, report: Report | None = None) -> list[Population]:
        """One population a training, made now where the store has none.

        All missing chunks of all trainings go to the engine together.
        """
        self.make(trainings, report=report)
        return [
            assembled(t, self.plan, [self._load(part) for part in chunks(t, self.plan)]) for t in trainings
        ]

    def trajectories(self, experts: Experts, *, report: Report | None = None) -> Trajectories:
        """The experts' way, made now where the store has none that goes as far. Of files the headers are read."""
        self.make([experts], report=report)
        parts = experts.cut(self.plan)
        size = experts.shapes.size
        return Trajectories(
            experts.net,
            experts.shapes,
            experts.passes,
            tuple(self._found(part, size) for part in parts),
            tuple(len(part.keys) for part in parts),
        )

    def _found(self, part: Experts, size: int) -> Path | torch.Tensor:
        found = self._find(part, size)
        if found is None:  # another process has cleared it away in the meantime
            self.make([part])
            found = self._find(part, size)
        if found is None:
            raise UserError(
                f"experts in {self.folder} are removed while they are in use",
                fix="give each process a store of its own, or run the command again",
            )
        if isinstance(found, torch.Tensor):
            return found
        if self.engine.place != "cluster":
            return found.absolute()  # a worker may stand in another folder than this process
        # Other machines do not have the file. Its numbers are mapped, and one tensor a file travels once for all jobs.
        if found not in self._mapped:
            self._mapped[found] = load_file(found)["snapshots"]
        return self._mapped[found]

    def make(self, requests: Iterable[Request], *, report: Report | None = None) -> None:
        """See that the store has these populations and experts, without reading them."""
        parts = list(self._missing(requests))
        jobs = [part.training if isinstance(part, Experts) else part for part in parts]
        shorter = on_the_way(jobs)
        waiting = {i for those in shorter.values() for i in those}
        apart = [i for i in range(len(jobs)) if i not in waiting]
        total = sum(len(jobs[i].keys) for i in apart)
        stacks = [
            tuple(apart[place] for place in stack)
            for stack in together([jobs[i] for i in apart], self.plan, self.engine.workers)
        ]
        # Long ones first: the workers end together.
        stacks.sort(key=lambda stack: -sum(jobs[i].image_steps for i in stack))
        done = 0
        work = [([jobs[i] for i in stack], self.plan) for stack in stacks]
        for place, populations in self.engine.map(train_stack, work):
            for i, population in zip(stacks[place], populations, strict=True):
                self._save(parts[i], population)
                self.trained.update(jobs[i].identities())
                done += len(jobs[i].keys)
                for j in shorter.get(i, ()):
                    self._save(parts[j], population.ended(jobs[j].steps, jobs[j].snapshots))
            if report is not None:
                report(done, total)
        if parts:
            self._shrink()

    def missing(self, requests: Iterable[Request]) -> list[Request]:
        """The chunks that the store lacks."""
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
        wanted = [request for request in requests if isinstance(request, Experts)]
        for experts in sorted(wanted, key=lambda experts: -experts.passes):
            for each in experts.cut(self.plan):
                name = self._name(each)
                if name not in asked and self._find(each, experts.shapes.size) is None:
                    yield each
                asked.add(name)

    def _name(self, part: Request) -> str:
        # Experts of any length have one name: their shortest training's.
        what = part.lasting(1) if isinstance(part, Experts) else part
        return fingerprint(what.fingerprint, describe(self.plan), torch.__version__, part.data.device.type)

    def _find(self, part: Experts, size: int) -> Path | torch.Tensor | None:
        """Where the trajectories of these experts of ``size`` parameters lie, if any go as far.

        A damaged file is worth no more than none: it is removed.
        """
        name = self._name(part)
        if self.folder is None:
            known = self._trajectories.get(name)
            return None if known is None or known.shape[1] <= part.passes else known
        for path in sorted((self.folder / "experts").glob(f"{name[:40]}.*.safetensors")):
            digits = path.name.split(".")[1]
            if not digits.isdecimal() or int(digits) < part.passes:
                continue
            if _is_whole(path, (len(part.keys), int(digits) + 1, size)):
                self._used.add(path)
                _touch(path)
                return path
            path.unlink(missing_ok=True)
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
        _touch(path)
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


def on_the_way(jobs: Sequence[Training]) -> dict[int, list[int]]:
    """By the place of a training, the places of those that end at a moment that it keeps: they are read off it, not trained.

    They are alike in all but the count of steps, on which nothing else depends. Networks with buffers (running means) are left out:
    of those only the last are kept.
    """
    alike: dict[str, list[int]] = {}
    for i, job in enumerate(jobs):
        if job.recipe.schedule == "constant" and job.order is None and job.observe is None:
            same = replace(job, recipe=job.recipe.but(steps=0), snapshots=())
            alike.setdefault(same.fingerprint, []).append(i)
    found: dict[int, list[int]] = {}
    for places in alike.values():
        longest = max(places, key=lambda i: jobs[i].steps)
        kept = set(jobs[longest].snapshots)
        those = [i for i in places if i != longest and {jobs[i].steps, *jobs[i].snapshots} <= kept]
        if those and not jobs[longest].net.init(jobs[longest].data, jobs[longest].keys[0])[1]:
            found[longest] = those
    return found


def _is_whole(path: Path, shape: tuple[int, int, int]) -> bool:
    """Whether a file holds snapshots [e, t, P] of that shape, by its header and size."""
    try:
        return read_header(path, "snapshots")[1] == shape
    except UserError:
        return False


def _touch(path: Path) -> None:
    """Note that a file was used now; one that has gone in the meantime stays away."""
    with suppress(FileNotFoundError):
        os.utime(path)
