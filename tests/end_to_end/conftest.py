from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# The smallest study that still goes through every room.
SMALL = [
    "--preset", "smoke", "--methods", "dm,mtt", "--workers", "2",
    "--set", "dm.steps=12", "--set", "dm.net.width=8",
    "--set", "mtt.steps=6", "--set", "mtt.net.width=8", "--set", "mtt.experts=2", "--set", "mtt.syn_steps=4",
    "--set", "herding.net.width=8", "--set", "herding.recipe.steps=20",
    "--set", "accuracy.net.width=8", "--set", "accuracy.protocol.recipe.steps=40",
    "--set", "mixing.net.width=8", "--set", "mixing.recipe.steps=40", "--set", "mixing.real_per_class=0,1,3",
    "--set", "recognition.recipe.steps=20", "--set", "recognition.seeds=1",
    "--set", "early_agreement.net.width=8", "--set", "early_agreement.early=3",
    "--set", "early_agreement.subset=6", "--set", "early_agreement.recipe.steps=40",
    "--set", "early_agreement.subset_recipe.steps=40", "--set", "early_agreement.early_recipe.steps=40",
    "--set", "leave_one_out.net.width=8", "--set", "leave_one_out.recipe.steps=20",
]  # fmt: skip

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def distillens() -> Command:
    """The command as a user runs it."""

    def call(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "distillens.cli", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            check=False,
        )

    return call


@pytest.fixture(scope="session")
def small_study(distillens: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small study."""
    to = tmp_path_factory.mktemp("study") / "digits"
    done = distillens("study", "--to", to, *SMALL)
    assert done.returncode == 0, done.stderr
    return to


@pytest.fixture(scope="session")
def small() -> list[str]:
    """The arguments of the small study."""
    return list(SMALL)
