"""What can befall a long work: a full disk, a file that may not grow, Ctrl-C, a second command in the same folder."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distillens import folders, making, pipeline, sessions, studies
from distillens.core import storage
from distillens.core.checks import UserError
from distillens.core.config import describe
from distillens.core.dataset import Splits
from distillens.core.rng import Key
from distillens.data.planted import planted
from distillens.engine.plan import Plan
from distillens.runs import Runs
from distillens.train import Population, Training
from tests.end_to_end.folders import gone, settled

COMMAND = [sys.executable, "-m", "distillens.cli"]
MTT = [
    "steps=3",
    "net.width=4",
    "net.depth=1",
    "experts=2",
    "syn_steps=2",
    "expert_epochs=1",
    "max_start_epoch=1",
]


@pytest.fixture
def real() -> Splits:
    return planted(Key(1), shape=(1, 8, 8), per_class=6)


class Disk:
    """A disk on which the first write of each file fails half way, as a full one does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failed: list[str] = []
        write = storage._write

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def once(path: Path, pieces: Iterator[bytes]) -> None:
            if str(path) in self.failed:
                return write(path, pieces)
            self.failed.append(str(path))
            with monkeypatch.context() as patch:
                patch.setattr(storage.os, "fsync", full)
                return write(path, pieces)

        monkeypatch.setattr(storage, "_write", once)


def until_it_is_done(work: Callable[[], object], left: Callable[[], list[Path]]) -> int:
    """Do a work again after each failure; how often it failed. Nothing half-written may lie about in between."""
    failures = 0
    while True:
        try:
            work()
        except UserError as error:
            assert "the disk is full: free some space and run the command again" in str(error)
            assert left() == []
            failures += 1
        else:
            return failures


def test_a_distillation_whose_every_write_fails_once_ends_in_the_same_bytes(
    real: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "CHECKPOINT_SECONDS", -1.0)

    def work(to: Path) -> None:
        pipeline.distill("mtt", real, settings=MTT, to=to / "set", store=to / "store")

    work(tmp_path / "whole")
    disk = Disk(monkeypatch)
    there = tmp_path / "full"
    failures = until_it_is_done(lambda: work(there), lambda: list(there.rglob("*.part")))
    assert (
        failures == len(disk.failed) >= 6
    )  # the request, experts, a checkpoint, the set and what belongs to it
    assert settled(there) == settled(tmp_path / "whole")


def test_the_rest_of_a_study_whose_every_write_fails_once_ends_in_the_same_bytes(
    digits: Splits, small: list[str], small_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All but the store and the sets, each of which the distillation's own test goes through: they are taken over.
    there = tmp_path / "full"
    for name in ("store", "sets"):
        shutil.copytree(small_study / name, there / name)
    shutil.copy(small_study / "request.json", there)
    settings = tuple(value for flag, value in zip(small[::2], small[1::2], strict=True) if flag == "--set")
    disk = Disk(monkeypatch)

    def work() -> None:
        studies.study(digits, there, methods=("dm", "mtt"), preset="smoke", settings=settings, workers=1)

    failures = until_it_is_done(work, lambda: list(there.rglob("*.part")))
    assert failures == len(disk.failed) >= 6
    assert settled(there) == settled(small_study)


def test_a_run_goes_on_with_the_plan_that_it_began_with(
    real: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, later = Plan(), Plan("loop", 1)

    def work(plan: Plan, force: bool = False, steps: int = 99) -> dict[str, object]:
        def tell(what: str, done: int, total: int) -> None:
            if what.startswith("distilling") and done == steps:
                raise KeyboardInterrupt

        monkeypatch.setattr(sessions, "plan_for", lambda *_, **__: plan)  # as if the machine had measured so
        made = pipeline.distill("mtt", real, settings=MTT, to=tmp_path / "set", force=force, tell=tell)
        return dict(made.provenance.plan)

    with pytest.raises(KeyboardInterrupt):
        work(began, steps=2)
    assert work(later) == describe(began)
    assert work(later) == describe(began)  # finished
    assert work(later, force=True) == describe(later)


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))


def test_a_file_that_may_not_grow_is_an_error_that_keeps_the_earlier_state(
    distillens, tmp_path: Path
) -> None:
    words = ["distill", "mtt", "--ipc", "1", *(part for one in MTT for part in ("--set", one))]
    whole = distillens(*words, "--to", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    stopped = subprocess.run(
        [*COMMAND, *words, "--to", str(tmp_path / "set")],
        capture_output=True, text=True, check=False, preexec_fn=limited,
    )  # fmt: skip
    assert stopped.returncode == 2
    assert "ulimit -f" in stopped.stderr.splitlines()[-1]
    assert (tmp_path / "set" / "request.json").is_file()
    assert not list(tmp_path.rglob("*.part"))
    again = distillens(*words, "--to", tmp_path / "set")
    assert again.returncode == 0, again.stderr
    assert settled(tmp_path / "set") == settled(tmp_path / "whole")


def on_a_disk(options: str, folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script beside ``here``, a file system with such options, where this machine lets us mount one."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    mount = f"cd {folder} && mkdir here && mount -t tmpfs -o {options} none here || exit 9\n"
    command = ["unshare", "-rm", "sh", "-c", f"{mount}touch mounted\n{script}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not (folder / "mounted").exists():
        pytest.skip(f"this system lets us mount nothing: {done.stderr}")
    return done


def test_a_disk_that_is_really_full_is_told_and_freed_space_goes_on(tmp_path: Path) -> None:
    command = " ".join([*COMMAND, "distill", "random_subset", "--ipc", "10", "--to", "here/set"])
    done = on_a_disk(
        "size=64k",
        tmp_path,
        f"head -c 60000 /dev/zero > here/ballast\n{command}; echo first $?\n"
        f"ls -A here/set; rm here/ballast; {command}; echo second $?\n",
    )
    assert "first 2" in done.stdout and "second 0" in done.stdout, done
    assert "the disk is full" in done.stderr
    assert ".part" not in done.stdout


def test_a_read_only_disk_is_told(tmp_path: Path) -> None:
    command = " ".join([*COMMAND, "distill", "random_subset", "--to", "here/set"])
    done = on_a_disk("ro", tmp_path, f"{command}; echo ended $?\n")
    assert "ended 2" in done.stdout, done
    assert "the file system is read-only: choose another folder with --to" in done.stderr


@pytest.mark.parametrize(
    ("number", "there"), [(signal.SIGINT, "store/*/*"), (signal.SIGTERM, "sets/ipc1/dm/0/provenance.json")]
)
def test_ctrl_c_stops_a_study_cleanly_and_it_goes_on(
    distillens, small_study: Path, small: list[str], tmp_path: Path, number: int, there: str
) -> None:
    to = tmp_path / "stopped"
    running = subprocess.Popen(
        [*COMMAND, "study", "--to", str(to), *small], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
        # A shell has Ctrl-C ignored in what it runs in the background, and these tests may be such.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not list(to.glob(there)):
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    # A terminal sends it to the whole group, a batch system to the command.
    os.killpg(running.pid, number) if number == signal.SIGINT else running.send_signal(number)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130
    assert told.splitlines()[-1] == "distillens: stopped; the same command goes on where it was"
    assert gone(running.pid), "workers outlived their command"
    assert not list(to.rglob("*.part"))
    done = distillens("study", "--to", to, *small)
    assert done.returncode == 0, done.stderr
    assert settled(to) == settled(small_study)


def test_a_second_command_in_a_folder_at_work_is_refused_and_harms_nothing(
    distillens, small_study: Path, small: list[str], tmp_path: Path
) -> None:
    to = tmp_path / "study"
    first = subprocess.Popen(
        [*COMMAND, "study", "--to", str(to), *small],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (to / "study.json").is_file():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)  # it is at work as long as we need it to be
    seconds = [distillens("study", "--to", to, *small, *words) for words in ([], ["--force"])]
    first.send_signal(signal.SIGCONT)
    for second in seconds:
        assert second.returncode == 2
        assert second.stderr.splitlines()[-1] == (
            f"distillens: another command is at work in {to}; wait until it ends, or choose another folder with --to"
        )
    _, told = first.communicate(timeout=120)
    assert first.returncode == 0, told
    assert settled(to) == settled(small_study)


STORE = """
import sys
from pathlib import Path
from distillens import making, pipeline
from distillens.core.rng import Key
from distillens.data.planted import planted
from distillens.engine.plan import Plan
from tests.end_to_end.test_durability import MTT
for replicate in range(3):
    real = planted(Key(1), shape=(1, 8, 8), per_class=6)
    made = pipeline.distill("mtt", real, replicate=replicate, settings=MTT, store=Path(sys.argv[1]))
    print(made.fingerprint)
"""


def test_two_commands_share_a_store(tmp_path: Path) -> None:
    def begin(folder: Path) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", STORE, str(folder)], stdout=subprocess.PIPE, text=True)

    alone, *together = (begin(tmp_path / name) for name in ("alone", "shared", "shared"))
    expected = alone.communicate(timeout=120)[0]
    assert len(expected.split()) == 3
    assert [each.communicate(timeout=120)[0] for each in together] == [expected] * 2
    assert not list(tmp_path.rglob("*.part"))
    assert settled(tmp_path / "shared") == settled(tmp_path / "alone")


def test_a_store_that_another_command_clears_is_made_again(
    real: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distillens.core.recipe import Recipe
    from distillens.nets.mlp import MLP

    asked = Training(real.train, MLP(width=4), Recipe(steps=2), Key(0).split(2))
    whole = Runs(Plan()).get(asked)[0]
    runs, cleared = Runs(Plan(), folder=tmp_path / "store"), []
    load = runs._load

    def after_another_cleared(part: Training) -> Population:
        if not cleared:
            shutil.rmtree(tmp_path / "store")  # between the training and the reading
            cleared.append(part)
        return load(part)

    monkeypatch.setattr(runs, "_load", after_another_cleared)
    assert runs.get(asked)[0].final.equal(whole.final)
    assert set(runs.trained.values()) == {2}


@pytest.mark.parametrize("removed", range(4))
def test_a_run_that_is_made_again_by_force_and_stopped_meanwhile_goes_on(
    removed: int, real: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(force: bool) -> None:
        pipeline.distill(
            "dm", real, settings=["steps=2", "net.width=4", "net.depth=1"], to=tmp_path, force=force
        )

    work(False)
    before = settled(tmp_path)
    remove, count = folders.remove, iter(range(100))

    def stopped(item: Path) -> None:
        if next(count) == removed:
            raise KeyboardInterrupt
        remove(item)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "remove", stopped)
        with pytest.raises(KeyboardInterrupt):
            work(True)
    work(False)
    assert settled(tmp_path) == before
