"""The main job on a Ray cluster as a user runs it: the folder that processes make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.folders import settled

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def address(small_cluster: Any) -> str:
    """Where a cluster is that no command has started."""
    return str(small_cluster.get_runtime_context().gcs_address)


def test_a_study_on_a_cluster_ends_in_the_bytes_of_processes(
    distillens, small_study: Path, small: list[str], address: str, tmp_path: Path
) -> None:
    done = distillens("study", "--to", tmp_path / "there", *small, "--engine", "ray", "--address", address)
    assert done.returncode == 0, done.stderr
    assert "training models for all questions: " in done.stderr  # progress is told here
    assert "distilling the sets: 8 of 8" in done.stderr
    there, here = settled(tmp_path / "there"), settled(small_study)
    assert sorted(there) == sorted(here)
    assert [name for name in here if there[name] != here[name]] == []
    assert (tmp_path / "there" / "report.html").is_file()


def test_a_question_is_asked_on_a_cluster_of_this_machine_alone(
    distillens, small_study: Path, tmp_path: Path
) -> None:
    folder = small_study / "sets" / "ipc1" / "dm" / "0"
    words = ["ask", "behaviour/recognition", folder, "--set", "recipe.steps=20", "--set", "seeds=1", "--json"]
    here = distillens(*words, "--to", tmp_path / "here")
    there = distillens(*words, "--to", tmp_path / "there", "--engine", "ray")
    assert there.returncode == here.returncode == 0, there.stderr
    assert json.loads(there.stdout) == json.loads(here.stdout)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--engine", "rai"],
            "distillens: unknown engine 'rai'; Did you mean 'ray'? Known: processes, ray\n",
        ),
        (
            ["--address", "auto"],
            "distillens: processes have no address; got auto; add --engine ray for a cluster\n",
        ),
    ],
)
def test_an_engine_that_there_is_not_is_refused_before_anything_is_made(
    distillens, tmp_path: Path, words: list[str], message: str
) -> None:
    done = distillens("study", "--to", tmp_path / "s", *words)
    assert (done.returncode, done.stderr) == (2, message)
    assert not (tmp_path / "s").exists()
