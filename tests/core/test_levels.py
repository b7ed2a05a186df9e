"""Imports only go down: the levels of the package, held on the syntax tree, and what an import may do."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import distillens

ROOT = Path(distillens.__file__).parent

# The first part of a module's name below the package, and its level. The root stands with the verbs:
# its names are looked up on first use and lead as high as they.
LEVELS = {
    "core": 0,
    "kernels": 0,
    "data": 1,
    "nets": 1,
    "augment": 1,
    "attributes": 1,
    "corruptions": 1,
    "attacks": 1,
    "formats": 2,
    "engine": 1,
    "train": 2,
    "stacks": 2,
    "unroll": 2,
    "cost": 2,
    "forecast": 2,
    "tuning": 2,
    "experts": 2,
    "curvature": 2,
    "attribution": 2,
    "runs": 2,
    "folders": 2,
    "sessions": 2,
    "evaluation": 2,
    "plugins": 3,
    "distillers": 3,
    "analyses": 3,
    "report": 3,
    "paper": 1,
    "presets": 3,
    "making": 4,
    "pipeline": 4,
    "given": 4,
    "studies": 4,
    "": 4,
    "cli": 5,
}
METHODS = 3  # at this level no room imports another
APART = {"distillers", "analyses", "plugins"}  # rooms whose public files never import one another


def room(module: str) -> str:
    """``distillens.analyses.behaviour.mixing``: ``analyses``; the root: nothing."""
    return module.split(".")[1] if "." in module else ""


def is_method(module: str) -> bool:
    """Whether a module is a public file of a room whose files stand apart, not the room or a folder."""
    path = ROOT.joinpath(*module.split(".")[1:])
    return room(module) in APART and not path.is_dir() and not path.name.startswith("_")


def imports(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything of the package that a module imports when it runs, wherever it does so."""
    path = ROOT.joinpath(*module.split(".")[1:])
    package = module if path.is_dir() else module.rpartition(".")[0]

    def exists(name: str) -> bool:
        place = ROOT.joinpath(*name.split(".")[1:])
        return name == "distillens" or place.is_dir() or place.with_suffix(".py").is_file()

    def visit(node: ast.AST) -> Iterator[tuple[int, str]]:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                yield from visit(child)
            return
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], base])
                base = base.rstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                names.append(inner if base.split(".")[0] == "distillens" and exists(inner) else base)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for name in names:
            if name.split(".")[0] == "distillens":
                yield getattr(node, "lineno", 0), name
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(source))


def violations(module: str, source: str) -> list[str]:
    """Imports of a module that do not go down, each in a line of words."""
    found = []
    here = room(module)
    for line, name in imports(module, source):
        there = room(name)
        if there not in LEVELS:
            found.append(f"{module}:{line} imports {name}, which has no level")
        elif there == here:
            if is_method(module) and is_method(name) and module != name:
                found.append(f"{module}:{line} imports its neighbour {name}")
            elif not is_method(module) and here in APART and is_method(name):
                found.append(f"{module}:{line} imports {name}: what files share knows none of them")
        elif LEVELS[there] > LEVELS[here]:
            found.append(f"{module}:{line} imports {name}, from level {LEVELS[here]} up to {LEVELS[there]}")
        elif LEVELS[there] == LEVELS[here] == METHODS:
            found.append(f"{module}:{line} imports {name}: two rooms of one level")
    return found


def modules() -> dict[str, Path]:
    """Every module of the package by name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def test_every_room_has_a_level() -> None:
    assert {room(module) for module in modules()} <= LEVELS.keys()


@pytest.mark.parametrize("module", modules())
def test_imports_only_go_down(module: str) -> None:
    assert violations(module, modules()[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("distillens.core.rng", "from distillens.core.checks import UserError"),
        (
            "distillens.core.rng",
            "import numpy, distillensx\nfrom . import checks\nfrom .checks import positive",
        ),
        ("distillens.core.rng", "if TYPE_CHECKING:\n    from distillens.train import Recipe"),
        ("distillens.core.rng", "import typing\nif typing.TYPE_CHECKING:\n    import distillens.cli"),
        ("distillens.data.digits", "from distillens import augment\nimport distillens.core.rng"),
        ("distillens.nets.mlp", "from distillens.data import load\nfrom distillens.engine.plan import Plan"),
        ("distillens.runs", "from distillens.train import train\nfrom distillens.engine import plan"),
        ("distillens.distillers.dm", "from distillens.distillers._pixels import small"),
        ("distillens.distillers.dm", "from distillens.nets.convnet import ConvNet\nimport distillens.unroll"),
        ("distillens.analyses", "from distillens.core.registry import Room"),
        ("distillens.report.html", "from distillens.report.summary import Summary"),
        ("distillens.analyses.behaviour.accuracy", "from distillens.evaluation.protocol import WDDL"),
        ("distillens.pipeline", "import distillens\nfrom distillens import analyses, __version__"),
        ("distillens.studies", "from distillens.pipeline import order\nfrom distillens.folders import claim"),
        ("distillens.cli", "def f():\n    from distillens import pipeline, studies"),
    ],
)
def test_the_checker_allows_what_goes_down(module: str, source: str) -> None:
    assert violations(module, source) == []


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("distillens.core.rng", "import distillens.data", "from level 0 up to 1"),
        ("distillens.core.rng", "from distillens import Key", "from level 0 up to 4"),
        ("distillens.core.rng", "import distillens", "from level 0 up to 4"),
        ("distillens.core.rng", "from ..train import train", "from level 0 up to 2"),
        ("distillens.core.rng", "from .. import augment", "imports distillens.augment, from level 0 up to 1"),
        (
            "distillens.core.rng",
            "def f():\n    from distillens.nets import room",
            ":2 imports distillens.nets",
        ),
        ("distillens.core.rng", "import_module('distillens.runs')", "from level 0 up to 2"),
        ("distillens.core.rng", "importlib.import_module('distillens.runs')", "from level 0 up to 2"),
        (
            "distillens.core.rng",
            "if TYPE_CHECKING:\n    pass\nelse:\n    import distillens.runs",
            ":4 imports",
        ),
        ("distillens.core.rng", "if not TYPE_CHECKING:\n    import distillens.runs", "from level 0 up to 2"),
        ("distillens.core.rng", "try:\n    import distillens.runs\nexcept ImportError:\n    pass", "up to 2"),
        ("distillens.core", "from .train import x\nfrom ..train import y", ":2 imports distillens.train"),
        ("distillens.augment", "from distillens.train import Recipe", "from level 1 up to 2"),
        ("distillens.nets", "from distillens.distillers import room", "from level 1 up to 3"),
        ("distillens.train", "from distillens.distillers.dm import DM", "from level 2 up to 3"),
        ("distillens.distillers.dm", "from distillens.analyses import room", "two rooms of one level"),
        ("distillens.analyses.behaviour.mixing", "import distillens.distillers.dm", "two rooms of one level"),
        ("distillens.analyses.behaviour.mixing", "from distillens.report import write", "two rooms"),
        (
            "distillens.report.html",
            "from distillens.analyses.behaviour.accuracy import Accuracy",
            "two rooms",
        ),
        ("distillens.evaluation.protocol", "from distillens.report import write", "from level 2 up to 3"),
        ("distillens.distillers.dm", "from distillens.distillers.dc import DC", "its neighbour"),
        ("distillens.distillers.dm", "from distillens.distillers import dc", "its neighbour"),
        ("distillens.distillers.dm", "from . import dc", "its neighbour distillens.distillers.dc"),
        ("distillens.distillers.dm", "from .dc import DC", "its neighbour distillens.distillers.dc"),
        (
            "distillens.analyses.behaviour.mixing",
            "from distillens.analyses.behaviour.recognition import Recognition",
            "its neighbour",
        ),
        (
            "distillens.analyses.behaviour.mixing",
            "from distillens.analyses.pointwise import leave_one_out",
            "its neighbour distillens.analyses.pointwise.leave_one_out",
        ),
        ("distillens.analyses.behaviour.mixing", "from ..pointwise.leave_one_out import x", "its neighbour"),
        ("distillens.distillers._pixels", "from distillens.distillers.dm import DM", "knows none of them"),
        ("distillens.distillers", "from distillens.distillers.dm import DM", "knows none of them"),
        ("distillens.distillers.dm", "from distillens.pipeline import distill", "from level 3 up to 4"),
        ("distillens.pipeline", "from distillens.cli import app", "from level 4 up to 5"),
        ("distillens.studies", "import distillens.tricks", "which has no level"),
    ],
)
def test_the_checker_finds_what_does_not(module: str, source: str, said: str) -> None:
    found = violations(module, source)
    assert len(found) == 1
    assert said in found[0]


def test_a_new_room_needs_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(LEVELS, "augment")
    assert violations("distillens.train", "from distillens import augment") == [
        "distillens.train:1 imports distillens.augment, which has no level"
    ]


LIGHT = """
import sys
import distillens
distillens.__version__, dir(distillens)
heavy = {"torch", "numpy", "scipy", "sklearn", "matplotlib", "pydantic"}
print(sorted(heavy & sys.modules.keys()), sorted(n for n in sys.modules if n.startswith("distillens.")))
import distillens.cli
print(sorted(heavy & sys.modules.keys()))
"""


def test_importing_the_package_or_its_command_imports_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[] []", "[]"]


QUIET = """
import json, os, random, signal, sys, threading, warnings
import numpy as np, torch, matplotlib

def state():
    kind, words, *rest = np.random.get_state()
    return {
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": [kind, words.tolist(), *rest],
        "random": repr(random.getstate()),
        "kind of number": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "environment": dict(os.environ),
        "backend": matplotlib.rcParams._get_backend_or_none(),
        "warnings": repr(warnings.filters),
        "running": threading.active_count(),
        "signals": [repr(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)],
        "folder": os.getcwd(),
        "hook": repr(sys.excepthook),
    }

torch.set_num_threads(3)
torch.manual_seed(5), np.random.seed(5), random.seed(5)
before = state()
from importlib import import_module
for name in json.loads(sys.argv[1]):
    import_module(name)
after = state()
print(json.dumps([len(sys.argv[1]), [name for name in before if before[name] != after[name]]]))
"""


def test_importing_any_module_changes_nothing_in_the_host_program() -> None:
    names = json.dumps(list(modules()))
    done = subprocess.run([sys.executable, "-c", QUIET, names], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [len(names), []]
