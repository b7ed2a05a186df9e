"""What the docs print is true: commands are accepted, the Python runs, the figures are those on record."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from distillens.analyses.pointwise.repair import Repair
from distillens.core.contracts import Sets
from distillens.core.dataset import Splits
from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.engine.plan import Plan
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for kind, text in fences if kind == language]


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "") for line in block.splitlines()]
    return [line.partition("#")[0].strip() for line in lines if line.startswith("distillens ")]


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 6


@pytest.mark.parametrize("command", commands())
def test_every_printed_command_is_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command reaches its verb with names that exist; the verbs themselves are tested end to end."""
    import distillens.report
    from distillens import cli, data, distillers, formats, making, pipeline, studies
    from distillens.evaluation import protocol

    reached: list[str] = []
    real_digits = data.load("digits")

    def digits() -> Any:
        return real_digits

    def study(real: Any, to: Path, **wishes: Any) -> Path:
        wishes = {
            k: v
            for k, v in wishes.items()
            # Sets that are there already are files that a test does not have.
            if k not in ("workers", "force", "device", "engine", "address", "tell", "announce", "distilled")
        }
        studies.design(digits(), **wishes)
        reached.append("study")
        return to

    def distill(method: str, source: str, *, settings: Any, ipc: int, **_: Any) -> Any:
        making.order(method, digits(), ipc, settings=settings)
        reached.append("distill")
        return type("Made", (), {"__len__": lambda self: 1, "fingerprint": ""})()

    def import_(source: Path, kind: str, *a: Any, **k: Any) -> Any:
        formats.room.find(kind)
        reached.append("import")
        return type("Found", (), {"__len__": lambda self: 1, "passes": 1})()

    def asked(name: str) -> Any:
        return lambda *a, **k: reached.append(name)

    def evaluate(*a: Any, **k: Any) -> None:
        protocol.find(k["protocol"])
        reached.append("evaluate")

    monkeypatch.setattr(data, "load", lambda spec, **_: digits())
    monkeypatch.setattr(studies, "study", study)
    monkeypatch.setattr(pipeline, "distill", distill)
    monkeypatch.setattr(pipeline, "evaluate", evaluate)
    monkeypatch.setattr(pipeline, "import_", import_)
    monkeypatch.setattr(pipeline, "ask", asked("ask"))
    monkeypatch.setattr(distillens.report, "write", asked("report"))
    monkeypatch.setattr(cli, "_load", lambda folders: ({}, {}, "digits"))
    monkeypatch.setattr(cli, "_deliver", lambda *a: None)
    monkeypatch.setattr(cli, "_deliver_whole", lambda *a: None)
    words = shlex.split(command)[1:]
    cli.app(words, standalone_mode=False)
    assert distillers.room.names()
    if words[0] != "list":
        assert words[0] in reached


def test_the_readmes_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 6
    exec(compile(code, "README.md", "exec"), {})


def test_the_python_about_mended_sets_runs(
    digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distillens import pipeline

    (code,) = blocks(ROOT / "docs" / "pointwise.md", "python")
    run = tmp_path / "runs" / "dm-10"
    one = pipeline.distill("dm", digits, ipc=3, settings=["steps=1", "net.width=8", "net.depth=2"], threads=1)
    one.save(run)
    assert one.provenance is not None
    analysis = Repair(
        ConvNet(2, 8), Recipe(steps=2), inits=1, fresh=1, draws=1, kept=(0.5,), policies=("drop", "replace")
    )
    analysis(Sets({one.provenance.method: (one,)}), digits, Runs(Plan()), key=Key(0)).save(run / "results")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "pointwise.md", "exec"), names)
    assert len(names["best"]) == 20
    changed = (names["mended"].stored["images"] != one.stored["images"]).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == sorted(names["result"].weak["dm"].tolist())


def test_every_block_of_python_is_run() -> None:
    found = {page.name: len(blocks(page, "python")) for page in PAGES if blocks(page, "python")}
    assert found == {"README.md": 1, "pointwise.md": 1}
    statement = re.compile(r"^(from [\w.]+ )?import [\w., ]+$", re.MULTILINE)
    bare = [page.name for page in PAGES if any(map(statement.search, blocks(page, "")))]
    assert bare == [], "say that a block is Python, and run it here"


def test_the_figures_in_the_docs_are_those_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    sys.modules.pop("render", None)
    import render

    stale = [page.name for page in render.pages() if render.rendered(page.read_text()) != page.read_text()]
    assert stale == [], "run: python docs/render.py"
