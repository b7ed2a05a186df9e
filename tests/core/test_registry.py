"""The folder is the registry: files are found by name, and only the one asked for is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distillens import analyses, distillers, nets
from distillens.core.checks import UserError
from distillens.core.registry import Room

ROOMS = {"method": distillers.room, "network": nets.room, "analysis": analyses.room}
PROGRAM = """
import json, sys
from distillens import analyses, distillers, nets
rooms = [distillers.room, nets.room, analyses.room]
names = [room.names() for room in rooms]
loaded = [f"{room.package}.{name}".replace("/", ".") for room, all in zip(rooms, names) for name in all]
before = [name for name in loaded if name in sys.modules]
nets.room.find("mlp")
after = [name for name in loaded if name in sys.modules]
print(json.dumps([names, before, after]))
"""


def test_names_are_listed_without_importing_them() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    names, before, after = json.loads(done.stdout)
    assert names == [room.names() for room in ROOMS.values()]
    assert before == []
    assert after == ["distillens.nets.mlp"]


@pytest.mark.parametrize("what", ROOMS)
def test_names_are_the_public_files_of_the_folder(what: str) -> None:
    room = ROOMS[what]
    root = Path(sys.modules[room.package].__file__ or "").parent
    files = [path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.py")]
    public = sorted(name for name in files if not any(part.startswith("_") for part in name.split("/")))
    assert room.names() == public
    assert public


@pytest.mark.parametrize(("what", "name"), [(what, n) for what, room in ROOMS.items() for n in room.names()])
def test_the_class_has_the_name_of_its_file(what: str, name: str) -> None:
    found: type = ROOMS[what].find(name)
    assert found.__name__.lower() == name.split("/")[-1].replace("_", "")
    assert found.__module__ == f"{ROOMS[what].package}.{name.replace('/', '.')}"


@pytest.mark.parametrize(
    ("room", "name", "message"),
    [
        (distillers.room, "dmm", "unknown method 'dmm'; Did you mean 'dm'? Known: "),
        (distillers.room, "DM", "unknown method 'DM'; "),
        (distillers.room, "_pixels", "unknown method '_pixels'; "),
        (nets.room, "convnt", "unknown network 'convnt'; Did you mean 'convnet'? Known: "),
        (analyses.room, "mixing", "unknown analysis 'mixing'; Did you mean 'behaviour/mixing'? "),
        (analyses.room, "behaviour", "unknown analysis 'behaviour'; "),
        (nets.room, "../core/rng", "unknown network '../core/rng'; "),
        (nets.room, "", "unknown network ''; "),
    ],
)
def test_an_unknown_name_gets_a_suggestion(room: Room[object], name: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        room.find(name)
    assert str(error.value).startswith(message)


@pytest.fixture
def planted_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room[type]]:
    """A package with a method of two words, a private file, and a folder of its own."""
    package = tmp_path / "planted_room"
    (package / "question").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "question" / "__init__.py").touch()
    (package / "two_words.py").write_text(
        "from dataclasses import dataclass\n"
        "class Helper: pass\n"
        "@dataclass\nclass Borrower: pass\n"
        "@dataclass\nclass TwoWords: pass\n"
    )
    (package / "borrower.py").write_text(
        "from dataclasses import dataclass\n"
        "from planted_room.two_words import Borrower as Theirs\n"
        "@dataclass\nclass Borrower(Theirs): pass\n"
    )
    (package / "_private.py").write_text("raise AssertionError('imported')\n")
    (package / "broken.py").write_text("raise AssertionError('imported')\n")
    (package / "question" / "answer.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Answer: pass\n"
    )
    (package / "question" / "_private.py").touch()
    (package / "notes.txt").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Room("planted_room", "thing")
    for name in [name for name in sys.modules if name.split(".")[0] == "planted_room"]:
        del sys.modules[name]


def test_a_new_file_is_found_by_being_there(planted_room: Room[type]) -> None:
    assert planted_room.names() == ["borrower", "broken", "question/answer", "two_words"]
    assert planted_room.find("two_words").__name__ == "TwoWords"
    assert planted_room.find("borrower").__module__ == "planted_room.borrower"
    assert planted_room.find("question/answer").__module__ == "planted_room.question.answer"
