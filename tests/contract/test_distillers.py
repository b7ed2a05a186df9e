"""What every distillation method must keep. A new file in ``distillens/distillers`` is held to all of it."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from distillens import distillers, making
from distillens.core.artefact import DistilledDataset, Provenance
from distillens.core.checks import UserError
from distillens.core.config import describe, override, restore, settings_of
from distillens.core.contracts import Distiller, Log, Problem, State
from distillens.core.dataset import Dataset, Splits
from distillens.core.decode import MultiFormation, Pixels
from distillens.core.rng import Key
from distillens.core.space import same_space
from distillens.core.storage import fingerprint, read_json
from distillens.data.planted import planted
from distillens.engine.plan import Plan
from distillens.experts import Experts, Trajectories
from distillens.runs import Runs

IPC = 2
STEPS = 3
FAMILIES = {"gradient", "distribution", "trajectory", "unrolled", "kernel", "coreset"}

# What makes any method quick, where it has such a setting; each change must fit those before it. A new method adds
# its own loops here.
TINY = {
    "steps": str(STEPS),
    "net.depth": "1",
    "net.width": "4",
    "batch_real": "4",
    "batch_syn": "1",
    "batch_train": "4",
    "window": "2",
    "inner_steps": "3",
    "donors_every": "1",
    "inner_loop": "2",
    "outer_loop": "2",
    "syn_steps": "6",  # one pass over the images
    "experts": "2",
    "expert_epochs": "1",
    "expert_batch": "8",
    "expansion_end": "2",
    "first_max_start_epoch": "1",
    "max_start_epoch": "2",
    "threshold": "1e9",  # no step is skipped
    "pool": "2",
    "max_age": "2",
    "n_bases": "4",
    "downsample": "2",
    "n_nets": "2",
    "nets": "2",
    "per_step": "1",
    "distill_epochs": "2",
    "redraw": "2",
    "n_data": "8",
    "early": "1",
    "augment_net": "crop",
    "cutmix": "0.5",
    "num_freqs": "8",
    "factor": "2",
    "recipe.steps": "4",
    "augment": "color_crop_cutout_flip_scale_rotate",
}

names = distillers.room.names()
every_method = pytest.mark.parametrize("name", names)
every_channel = pytest.mark.parametrize("channels", [1, 3])
that_learn = pytest.mark.parametrize("name", [n for n in names if not distillers.room.find(n).selects])
that_select = pytest.mark.parametrize("name", [n for n in names if distillers.room.find(n).selects])


def real(channels: int = 1) -> Splits:
    """Three classes of 8 x 12 images, newly made at each call."""
    return planted(Key(7), per_class=8, shape=(channels, 8, 12))


def tiny(name: str, data: Dataset, ipc: int = IPC, **changes: str) -> Distiller:
    method = distillers.room.find(name).defaults(data, ipc)
    known = settings_of(method)
    wanted = {field: text for field, text in {**TINY, **changes}.items() if field in known}
    return override(method, [f"{field}={text}" for field, text in wanted.items()])


def problem_of(
    method: Distiller,
    data: Dataset,
    ipc: int = IPC,
    key: Key = Key(0, ("contract",)),
    shared: Key = Key(0, ("shared",)),
) -> Problem:
    bare = Problem(data, ipc, key, shared=shared)
    return replace(bare, inputs=inputs_of(method, bare, Runs(Plan())))


def inputs_of(method: Distiller, problem: Problem, runs: Runs) -> dict[str, Any]:
    """What the method starts from, as the pipeline hands it over."""
    return {
        place: runs.trajectories(need) if isinstance(need, Experts) else runs.get(need)[0]
        for place, need in method.needs(problem).items()
    }


def tensors_of(given: Any) -> list[torch.Tensor]:
    """The numbers in an input."""
    if isinstance(given, Trajectories):
        return [part for part in given.parts if isinstance(part, torch.Tensor)]
    return [given.final, given.snapshots]


def go(
    method: Distiller, problem: Problem, state: State | None = None, first: int = 0
) -> tuple[list[State], list[Log]]:
    """The states before and after each step from ``first`` on, and the logs."""
    states, logs = [state or method.start(problem)], []
    for i in range(first, method.steps):
        after, log = method.step(problem, states[-1], i)
        states.append(after)
        logs.append(log)
    return states, logs


def bytes_of(state: State) -> str:
    return fingerprint(
        *(part for name in sorted(state.tensors) for part in (name, state.tensors[name])), state.values
    )


@cache
def whole(name: str, channels: int) -> tuple[Distiller, Problem, list[State], list[Log], DistilledDataset]:
    """One uninterrupted run, shared by the tests that only look at it."""
    data = real(channels).train
    method = tiny(name, data)
    problem = problem_of(method, data)
    states, logs = go(method, problem)
    return method, problem, states, logs, method.finish(problem, states[-1])


# ---- what a method says of itself ----


@every_method
def test_traits_are_there_and_of_their_kind(name: str) -> None:
    kind = distillers.room.find(name)
    assert isinstance(kind.paper, str)
    assert kind.family in FAMILIES
    for trait in ("selects", "soft_labels", "learns_lr", "needs_experts"):
        assert isinstance(getattr(kind, trait), bool), trait
    assert kind.paper or kind.family == "coreset"  # only a baseline has no authors
    with pytest.raises(FrozenInstanceError):
        kind().steps = 1  # type: ignore[misc]
    about = (kind.__doc__ or "").strip().partition("\n")[0]
    assert about.endswith(".") and not about.startswith(f"{kind.__name__}(")


@every_method
@every_channel
def test_traits_are_kept(name: str, channels: int) -> None:
    method, problem, states, _, done = whole(name, channels)
    assert ("experts" in method.needs(problem)) == method.needs_experts
    assert (done.labels.kind != "hard") == method.soft_labels
    begun = method.finish(problem, states[0])
    if method.learns_lr:
        assert begun.recipe is not None and done.recipe is not None
        assert begun.recipe.lr != done.recipe.lr
    else:
        assert begun.recipe == done.recipe


@every_method
@pytest.mark.parametrize("shape", [(1, 8, 12), (1, 28, 28), (3, 32, 32)], ids=str)
@pytest.mark.parametrize("ipc", [1, 10, 50])
def test_there_are_defaults_for_every_size(name: str, shape: tuple[int, int, int], ipc: int) -> None:
    data = planted(Key(7), per_class=1, shape=shape).train
    method = distillers.room.find(name).defaults(data, ipc)
    problem = Problem(data, ipc, Key(0))
    assert type(method) is distillers.room.find(name)
    assert method.steps == 0 or method.steps >= 10
    assert method.work(problem) > 0 or method.steps == 0
    assert math.isfinite(method.memory(problem))


@every_method
def test_settings_survive_json(name: str) -> None:
    method = tiny(name, real().train)
    assert restore(json.loads(json.dumps(describe(method)))) == method


@every_method
def test_every_setting_can_be_set_from_text(name: str) -> None:
    method = tiny(name, real().train)
    texts = [f"{field}={value}" for field, value in settings_of(method).items()]
    assert override(method, texts) == method


@every_method
def test_work_grows_with_the_steps(name: str) -> None:
    method, problem, *_ = whole(name, 1)
    if method.steps == 0:
        assert method.work(problem) >= 0
        return
    assert method.work(problem) > 0
    double = override(method, [f"steps={2 * method.steps}"])
    assert double.work(problem) == pytest.approx(2 * method.work(problem))


@every_method
@pytest.mark.parametrize("batch", ["1", "50"])
def test_memory_is_known_before_anything_is_trained_and_grows_with_the_set(name: str, batch: str) -> None:
    data = real().train
    kind = distillers.room.find(name)
    method = tiny(name, data, batch_syn=batch)
    found = [method.memory(Problem(data, ipc, Key(0))) for ipc in (1, 2, 3, 7, 20)]
    assert all(type(size) is float and math.isfinite(size) and size >= 0 for size in found)
    assert kind.selects or found[0] > 0
    assert all(before <= after for before, after in pairwise(found))
    if not kind.selects and batch == "50":  # every image of the set is seen in a step
        assert found[0] < found[-1]


# ---- the same and not the same ----


@every_method
@every_channel
def test_the_same_key_gives_the_same_bytes(name: str, channels: int) -> None:
    _, _, states, logs, done = whole(name, channels)
    data = real(channels).train
    method = tiny(name, data)
    again_states, again_logs = go(method, problem_of(method, data))
    assert [bytes_of(s) for s in again_states] == [bytes_of(s) for s in states]
    assert again_logs == logs
    again = method.finish(problem_of(method, data), again_states[-1])
    assert again.fingerprint == done.fingerprint


@every_method
def test_another_key_gives_other_data(name: str) -> None:
    method, _, _, _, done = whole(name, 1)
    data = real().train
    found = {done.fingerprint}
    for seed in (1, 2, 3):
        # What chooses by a trained network alone draws from the shared key only; another replicate has others of both.
        shared = Key(seed, ("shared",)) if method.selects else Key(0, ("shared",))
        problem = problem_of(method, data, key=Key(seed), shared=shared)
        found.add(method.finish(problem, go(method, problem)[0][-1]).fingerprint)
    assert len(found) == 4 or (method.selects and len(found) > 1)


@that_learn
@every_channel
def test_every_step_moves_the_data_and_logs_numbers(name: str, channels: int) -> None:
    method, problem, states, logs, _ = whole(name, channels)
    images = [method.finish(problem, state).dataset().images for state in states]
    for before, after in pairwise(images):
        moved = (after - before).flatten(1).abs().amax(1)
        assert bool((moved > 0).any())
    total = (images[-1] - images[0]).flatten(1).abs().amax(1)
    assert bool((total > 0).all()), "an image was never moved"
    for log in logs:
        assert log.keys() == logs[0].keys() and log
        assert all(type(value) is float and value == value for value in log.values())


@that_learn
def test_a_step_depends_on_its_number(name: str) -> None:
    method, problem, states, _, _ = whole(name, 1)
    moved = [bytes_of(method.step(problem, states[0], i)[0]) for i in (0, 1, 2)]
    assert len(set(moved)) == 3, "two steps drew the same numbers"


# ---- purity ----


@every_method
@every_channel
def test_nothing_that_was_given_is_changed(name: str, channels: int) -> None:
    data = real(channels).train
    method = tiny(name, data)
    problem = problem_of(method, data)

    def given() -> str:
        inputs = [tensor for one in problem.inputs.values() for tensor in tensors_of(one)]
        assert len(inputs) >= len(problem.inputs)
        return fingerprint(data.images, data.labels.hard(), *inputs)

    before = given()
    state = method.start(problem)
    for i in range(method.steps):
        kept = bytes_of(state)
        after, _ = method.step(problem, state, i)
        assert bytes_of(state) == kept, f"step {i} changed the state it was given"
        assert not any(tensor.requires_grad for tensor in after.tensors.values())
        state = after
    kept = bytes_of(state)
    method.finish(problem, state)
    assert bytes_of(state) == kept
    assert given() == before
    assert not data.images.requires_grad and data.images.grad is None


@every_method
def test_global_generators_are_neither_read_nor_written(name: str) -> None:
    method, problem, states, _, _ = whole(name, 1)
    numpy.random.seed(5)
    random.seed(5)
    torch.manual_seed(5)
    before = [torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())]
    again, _ = go(method, problem)
    method.finish(problem, again[-1])
    after = [torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())]
    assert after == before
    assert bytes_of(again[-1]) == bytes_of(states[-1])  # under other global seeds


# ---- kill and go on ----


def reborn(name: str, channels: int, state: State, file: Path) -> tuple[Distiller, Problem, State]:
    """Method, problem and state as another process would have them: nothing is shared."""
    state.save(file)
    data = real(channels).train
    method = restore(json.loads(json.dumps(describe(tiny(name, data)))))
    return method, problem_of(method, data), State.load(file)


@every_method
@every_channel
def test_a_run_killed_after_any_step_ends_in_the_same_bytes(name: str, channels: int, tmp_path: Path) -> None:
    method, _, states, logs, done = whole(name, channels)
    for killed in range(method.steps + 1):
        new, problem, state = reborn(name, channels, states[killed], tmp_path / "state")
        assert bytes_of(state) == bytes_of(states[killed])
        again, again_logs = go(new, problem, state, killed)
        assert bytes_of(again[-1]) == bytes_of(states[-1]), f"killed after step {killed}"
        assert again_logs == logs[killed:]
        assert new.finish(problem, again[-1]).fingerprint == done.fingerprint


def elsewhere(folder: str) -> None:
    """In a new process: each method goes on from its state and says what it ends in."""
    place = Path(folder)
    ends = {}
    for name in names:
        data = real().train
        method = tiny(name, data)
        problem = problem_of(method, data)
        states, _ = go(method, problem, State.load(place / name), 1)
        ends[name] = [bytes_of(states[-1]), method.finish(problem, states[-1]).fingerprint]
    (place / "ends.json").write_text(json.dumps(ends))


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in names:
        _, _, states, _, _ = whole(name, 1)
        states[min(1, len(states) - 1)].save(folder / name)
    code = (
        "import runpy, sys, torch; torch.set_num_threads(1); torch.manual_seed(99)\n"
        "runpy.run_path(sys.argv[1])['elsewhere'](sys.argv[2])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code, __file__, str(folder)], check=True, env=environment)
    return json.loads((folder / "ends.json").read_text())  # type: ignore[no-any-return]


@every_method
def test_another_process_goes_on_to_the_same_bytes(name: str, ends: dict[str, list[str]]) -> None:
    _, _, states, _, done = whole(name, 1)
    assert ends[name] == [bytes_of(states[-1]), done.fingerprint]


class KilledError(Exception):
    pass


@that_learn
@pytest.mark.parametrize("killed", range(1, STEPS + 1))
def test_the_pipeline_goes_on_from_its_checkpoint(
    name: str, killed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, problem, _, logs, done = whole(name, 1)
    monkeypatch.setattr(making, "CHECKPOINT_SECONDS", -1.0)
    about = Provenance(name, describe(method), IPC, problem.key, "planted", "", plan=describe(Plan()))
    calls: list[int] = []

    def tell(what: str, step: int, total: int) -> None:
        calls.append(step)
        if len(calls) == killed:
            raise KilledError

    with pytest.raises(KilledError):
        making.run(method, problem, about, tmp_path, tell)
    assert not (tmp_path / "provenance.json").exists()
    # What raised has no checkpoint yet: its step is made again.
    made = making.run(restore(describe(method)), problem, about, tmp_path, tell)
    assert calls == [*range(1, killed + 1), *range(killed, STEPS + 1)]
    assert made.fingerprint == done.fingerprint
    assert DistilledDataset.load(tmp_path).fingerprint == done.fingerprint
    begun = method.finish(problem, method.start(problem))
    assert DistilledDataset.load(tmp_path / "initial").fingerprint == begun.fingerprint
    assert read_json(tmp_path / "log.json") == {n: [log[n] for log in logs] for n in logs[0]}
    assert not (tmp_path / "checkpoint.safetensors").exists()


# ---- what comes out ----


@every_method
@every_channel
@pytest.mark.parametrize("ipc", [1, IPC])
def test_the_set_is_worth_ipc_images_a_class_class_by_class(name: str, channels: int, ipc: int) -> None:
    data = real(channels).train
    method = tiny(name, data, ipc)
    problem = problem_of(method, data, ipc)
    states, _ = go(method, problem)
    done = method.finish(problem, states[-1])
    assert done.provenance is None  # the pipeline's to write
    check_size(method, problem, states)
    made = done.dataset()
    assert made.shape == (channels, 8, 12)
    assert made.images.dtype == data.images.dtype
    assert made.classes == data.classes
    assert same_space(made.space, data.space)
    assert replace(done, provenance=Provenance(name, {}, ipc, problem.key, "planted", "")).ipc == ipc


def check_size(method: Distiller, problem: Problem, states: list[State]) -> None:
    """Images are worth no more numbers than ``ipc`` plain ones a class; each class has as many, one after another."""
    begun, done = method.finish(problem, states[0]), method.finish(problem, states[-1])
    plain = 3 * problem.ipc * math.prod(problem.real.shape)
    assert 0 < sum(tensor.numel() for tensor in done.stored.values()) <= plain
    each, rest = divmod(len(done.dataset()), 3)
    assert rest == 0 and each >= 1
    # What is stored lies class by class; what it decodes to follows it, in the decoder's order.
    by_class = torch.arange(3).repeat_interleave(len(done) // 3)
    decoded = by_class[done.decode.origin(done.stored)].tolist()
    assert all(decoded.count(c) == each for c in range(3))
    assert begun.labels.hard().tolist() == by_class.tolist()
    assert begun.dataset().labels.hard().tolist() == decoded
    if not method.soft_labels:  # labels that are learned may come to favour another class
        assert done.dataset().labels.hard().tolist() == decoded
    if isinstance(done.decode, Pixels):
        assert len(done) == len(done.dataset()) == 3 * problem.ipc
        assert done.ipc == problem.ipc


@every_method
def test_labels_that_come_in_any_order_do_not_matter(name: str) -> None:
    """Real images in another order are the same problem, up to which are drawn: classes stay classes."""
    data = real().train
    mixed = data.take(Key(1).permutation(len(data)))
    method = tiny(name, mixed)
    problem = problem_of(method, mixed)
    begun = method.finish(problem, method.start(problem))
    images = begun.dataset().images
    if not method.selects and settings_of(method).get("init") != "real":
        return
    if isinstance(begun.decode, Pixels):
        assert origins(images, mixed) == [c for c in range(3) for _ in range(IPC)]
    else:  # no image is stored as it is, but each is like those of its class
        means = torch.stack([mixed.images[members].mean(0).flatten() for members in mixed.by_class])
        nearest = torch.cdist(images.flatten(1), means).argmin(1)
        assert nearest.tolist() == begun.dataset().labels.hard().tolist()


def origins(images: torch.Tensor, data: Dataset) -> list[int]:
    """The class of the real image that each image is, to the byte."""
    found = []
    for image in images:
        where = (data.images == image).flatten(1).all(1).nonzero().flatten().tolist()
        assert len(where) == 1, "not a real image, or one that is there twice"
        found.append(int(data.labels.hard()[where[0]]))
    return found


@that_select
@every_channel
@pytest.mark.parametrize("ipc", [1, 5, 8])
def test_what_selects_gives_different_real_images_of_the_right_class(
    name: str, channels: int, ipc: int
) -> None:
    data = real(channels).train
    method = tiny(name, data, ipc)
    problem = problem_of(method, data, ipc)
    made = method.finish(problem, method.start(problem))
    done = made.dataset()
    assert origins(done.images, data) == done.labels.hard().tolist()
    assert len(torch.unique(done.images.flatten(1), dim=0)) == 3 * ipc
    assert made.chosen is not None and made.chosen.device.type == "cpu"
    assert torch.equal(done.images, data.images[made.chosen])
    assert torch.equal(done.labels.hard(), data.labels.hard()[made.chosen])
    assert len(set(made.chosen.tolist())) == 3 * ipc


@that_learn
def test_what_learns_its_images_chooses_none(name: str) -> None:
    assert whole(name, 1)[-1].chosen is None


def scarce() -> Dataset:
    """Class '1' has three images, the others eight."""
    data = real().train
    return data.take(torch.cat([data.by_class[0], data.by_class[1][:3], data.by_class[2]]))


def starts_from_real(name: str) -> bool:
    kind = distillers.room.find(name)
    return kind.selects or "init" in {field.name for field in fields(kind)}  # type: ignore[arg-type]


def takes_real_images(name: str) -> bool:
    """Whether a point begins as a real image, or several made smaller: then a class must have enough of them."""
    data = real().train
    method = tiny(name, data, init="real")
    problem = problem_of(method, data)
    return isinstance(method.finish(problem, method.start(problem)).decode, Pixels | MultiFormation)


@pytest.mark.parametrize("name", [n for n in names if starts_from_real(n)])
def test_a_class_with_too_few_images_is_named(name: str) -> None:
    data = scarce()
    method = tiny(name, data, 4, init="real")
    if not takes_real_images(name):  # as many images as the storage pays for, whatever there are
        problem = problem_of(method, data, 4)
        check_size(method, problem, go(method, problem)[0])
        return
    with pytest.raises(UserError) as error:
        method.start(problem_of(method, data, 4))
    assert str(error.value) == (
        "class '1' has 3 images, 4 were asked for; ask for at most 3 images per class"
    )
    fits = problem_of(method, data, 3)
    assert method.finish(fits, go(method, fits)[0][-1]).ipc == 3


@that_learn
def test_noise_needs_no_real_image_of_its_own(name: str) -> None:
    data = scarce()
    method = tiny(name, data, 4, init="noise")
    problem = problem_of(method, data, 4)
    check_size(method, problem, go(method, problem)[0])


@that_learn
def test_images_in_float64_stay_so(name: str) -> None:
    """Reference tests need the digits; nothing on the way may round to float32."""
    data = real().train
    fine = Dataset(data.images.double(), data.labels, data.classes, data.space)
    method = tiny(name, fine)
    problem = problem_of(method, fine)
    states, _ = go(method, problem)
    for state in states:
        assert {t.dtype for t in state.tensors.values() if t.is_floating_point()} == {torch.float64}
    done = method.finish(problem, states[-1])
    assert done.dataset().images.dtype == torch.float64
    assert {t.dtype for t in done.stored.values()} == {torch.float64}


# ---- donors ----


def gives_donors(name: str) -> bool:
    return "donors" in settings_of(distillers.room.find(name)())


that_record = pytest.mark.parametrize("name", [n for n in names if gives_donors(n)])


def recording(name: str, channels: int) -> tuple[Distiller, Problem, list[State], list[Log]]:
    data = real(channels).train
    method = tiny(name, data, donors="true")
    problem = problem_of(method, data)
    return (method, problem, *go(method, problem))


@that_record
@every_channel
def test_a_record_of_donors_changes_no_image(name: str, channels: int) -> None:
    method, problem, states, logs = recording(name, channels)
    _, _, plain, plain_logs, done = whole(name, channels)
    assert logs == plain_logs
    for state, other in zip(states, plain, strict=True):
        assert all(torch.equal(state.tensors[part], tensor) for part, tensor in other.tensors.items())
    made = method.finish(problem, states[-1])
    assert replace(made, donors=None).fingerprint == done.fingerprint
    assert made.donors is not None and done.donors is None
    assert method.finish(problem, states[0]).donors is None  # nothing has moved yet


@that_record
@every_channel
def test_a_record_of_donors_goes_on_where_it_was_interrupted_and_is_saved(
    name: str, channels: int, tmp_path: Path
) -> None:
    method, problem, states, _ = recording(name, channels)
    for killed in range(method.steps + 1):
        states[killed].save(tmp_path / "state")
        again, _ = go(method, problem, State.load(tmp_path / "state"), killed)
        assert bytes_of(again[-1]) == bytes_of(states[-1]), f"killed after step {killed}"
    made = method.finish(problem, states[-1])
    about = Provenance(name, describe(method), IPC, problem.key, "planted", "")
    replace(made, provenance=about).save(tmp_path / "set")
    assert DistilledDataset.load(tmp_path / "set").fingerprint == made.fingerprint


@that_record
def test_parts_are_of_images_that_were_met(name: str) -> None:
    _, problem, states, _ = recording(name, 1)
    data, labels = problem.real, problem.real.labels.hard()
    for i, (before, after) in enumerate(pairwise(states)):
        parts, met = (
            after.tensors[f"donors.{part}"] - before.tensors[f"donors.{part}"] for part in ("parts", "met")
        )
        assert not parts[1 - i % 2].any() and not met[1 - i % 2].any()
        assert torch.bincount(labels[met[i % 2] == 1], minlength=3).tolist() == [4, 4, 4]
        assert not parts[i % 2][:, met[i % 2] == 0].any()
        assert parts[i % 2].any()
        if not i:  # all of the first step is a way
            ways = torch.stack([parts[0][:, own].sum(1) for own in data.by_class])
            assert (ways >= 0).all() and (ways > 0).any()


@that_record
def test_a_network_that_mixes_images_has_no_donors(name: str) -> None:
    data = real().train
    method = tiny(name, data, donors="true")
    method = override(method, ["net.norm=batch"])
    with pytest.raises(UserError) as error:
        method.start(problem_of(method, data))
    assert str(error.value) == (
        "donors are recorded under networks that keep images apart; got ConvNet, whose batch norm lets every image of a "
        "batch change the others'; choose another norm, or leave donors out"
    )


@pytest.mark.parametrize("name", [n for n in names if not gives_donors(n)])
def test_a_method_without_donors_says_why(name: str) -> None:
    method = distillers.room.find(name).defaults(real().train, 1)
    with pytest.raises(UserError) as error:
        override(method, ["donors=true"])
    kind = type(method)
    # Methods without the setting say why in an attribute that the contract does not ask for.
    assert str(error.value) == f"{kind.__name__.lower()} has no setting 'donors': {kind.lacks['donors']}"  # type: ignore[attr-defined]
    told = {
        "trajectory": "through whole trainings of experts, which blend them",
        "unrolled": "to tell their parts apart takes a way through the whole training for each image",
        "kernel": "every real image, of whatever class, moves every point of its regression",
        "coreset": "its points are real images, and the set says which",
    }
    assert told[kind.family] in str(error.value)


# ---- the tests' own checks ----


def test_bytes_of_sees_a_single_bit() -> None:
    state = State({"a": torch.zeros(3)}, {"b": 1.0})
    other = State({"a": torch.tensor([0.0, 0.0, 1e-45])}, {"b": 1.0})
    assert bytes_of(state) != bytes_of(other)
    assert bytes_of(state) != bytes_of(State({"a": torch.zeros(3)}, {"b": 1.0 + 2**-52}))
