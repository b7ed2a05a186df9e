"""What a model is asked about each image, and its answers: a closed set, kept as they come."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distillens.attributes import fingerprints
from distillens.core.checks import UserError
from distillens.core.dataset import Dataset
from distillens.core.storage import fingerprint

CACHE = "~/.cache/distillens/answers"
OTHER = "other"
_QUESTION = re.compile(r"\s*([^():;,|]+?)\s*\(([^;]*)\)\s*:\s*([^();:]+?)\s*")


@dataclass(frozen=True)
class Question:
    """One attribute: its name, the text, and the closed set of answers, each with the words that mean it (the first names it)."""

    name: str
    text: str
    answers: tuple[tuple[str, ...], ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The name of each answer."""
        return tuple(answer[0] for answer in self.answers)

    def place(self, said: str) -> int:
        """The answer whose whole word comes first in a free text; the number of answers (``other``) where none does."""
        found = [
            (match.start(), -len(word), i)
            for i, answer in enumerate(self.answers)
            for word in answer
            if (match := re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", said.lower()))
        ]
        return min(found)[2] if found else len(self.answers)


def parse(text: str) -> tuple[Question, ...]:
    """The questions in a text: ``NAME (TEXT): ANSWER, ANSWER|SYNONYM, ...``, divided by semicolons.

    Raises:
        UserError: a question is written otherwise, has less than two answers, or a name or word is there twice.
    """
    questions = []
    for part in filter(str.strip, text.split(";")):
        match = _QUESTION.fullmatch(part)
        answers = (
            tuple(
                tuple(word.strip() for word in answer.split("|") if word.strip())
                for answer in match[3].split(",")
            )
            if match
            else ()
        )
        if match is None or len(answers) < 2 or not all(answers):
            raise UserError(
                "a question is not written as it should be",
                got=repr(part.strip()),
                expected="NAME (TEXT): ANSWER, ANSWER|SYNONYM, and so on",
                fix="semicolons divide questions",
            )
        words = [word.lower() for answer in answers for word in answer]
        for word in words:
            if words.count(word) > 1 or word == OTHER:
                raise UserError(
                    f"the question {match[1]!r} has the word {word!r} twice"
                    if word != OTHER
                    else f"the question {match[1]!r} has the answer {OTHER!r}, which is what no answer fits"
                )
        questions.append(Question(match[1], match[2].strip(), answers))
    names = [question.name for question in questions]
    if not names or len(set(names)) != len(names):
        raise UserError("questions need names, all different", got=", ".join(names) or "no question")
    return tuple(questions)


class Answers:
    """Answers to one question from one model, by image: a JSON line each, on the disk as soon as they are there.

    A process that is killed leaves at most one torn line, which is no answer: the image is asked about again.
    """

    def __init__(self, folder: Path, model: str, question: str, asked: Any) -> None:
        """The answers that ``folder`` has from ``model`` to ``asked`` (what is sent, JSON); ``question`` is its name."""
        self._path = folder / f"{fingerprint(model, asked)[:24]}.jsonl"
        self._beside = {"model": model, "question": question}
        self.known: dict[str, str] = {}
        self._torn = False
        if self._path.exists():
            lines = self._path.read_bytes()
            self._torn = not lines.endswith(b"\n") and bool(lines)
            for line in lines.split(b"\n"):
                try:
                    one = json.loads(line)
                    self.known[one["image"]] = str(one["answer"])
                except (ValueError, KeyError, TypeError):
                    continue

    def add(self, answers: Mapping[str, str]) -> None:
        """Keep answers by the image's fingerprint."""
        import os

        lines = [
            json.dumps({"image": image, **self._beside, "answer": said}) for image, said in answers.items()
        ]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                # A torn line is closed: what follows stands on lines of its own.
                file.write((b"\n" if self._torn else b"") + "".join(f"{x}\n" for x in lines).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"answers cannot be kept in {self._path.parent}",
                got=str(error),
                fix="name another folder: set the source's cache",
            ) from error
        self._torn = False
        self.known |= answers


Ask = Callable[[list[Any], Sequence[Question]], Iterator[tuple[Question, list[str]]]]


def answered(
    data: Dataset,
    questions: Sequence[Question],
    *,
    asked: Callable[[Question], Any],
    model: str,
    cache: str,
    batch: int,
    loaded: Callable[[], Ask],
) -> dict[str, list[str]]:
    """The answer about each image, by question: those that are kept, and for the others the model's.

    ``asked`` is what the model is sent, ``loaded`` gives a function from pictures and questions to answers, question by question; it is
    called only where an answer is missing.
    """
    folder = Path(cache).expanduser()
    names = fingerprints(data)
    kept = {q.name: Answers(folder, model, q.name, asked(q)) for q in questions}
    missing = {q.name: {name for name in names if name not in kept[q.name].known} for q in questions}
    first = {name: i for i, name in reversed(list(enumerate(names)))}  # one image may be there twice
    wanted = [i for name, i in first.items() if any(name in lacking for lacking in missing.values())]
    if wanted:
        ask = loaded()
        for index in torch.split(torch.tensor(sorted(wanted)), batch):
            shown = [names[i] for i in index.tolist()]
            lacking = [q for q in questions if not missing[q.name].isdisjoint(shown)]
            for question, said in ask(pictures(data.take(index)), lacking):
                kept[question.name].add(dict(zip(shown, said, strict=True)))
    return {q.name: [kept[q.name].known[name] for name in names] for q in questions}


def pictures(data: Dataset) -> list[Any]:
    """The images as Pillow's, in three channels of 8 bits."""
    from PIL import Image

    pixels = (data.pixels().clamp(0, 1) * 255 + 0.501).floor().to(torch.uint8).cpu()
    three = pixels if data.shape[0] == 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in three]


def identity(name: str) -> str:
    """What tells a model from others: a name of the hub, or of a folder all files with their sizes and times."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = [[str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    return f"folder {fingerprint(found)[:24]}"


def from_transformers(name: str, kind: str, owner: str) -> tuple[Any, Any]:
    """A model of transformers' class ``kind`` and its processor, from a local folder or the hub, ready to be asked.

    Raises:
        UserError: transformers is not there, or the model cannot be loaded; ``owner`` is the source that says so.
    """
    try:
        import transformers
        from PIL import Image  # noqa: F401 - its absence shows here, not deep in a processor
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{owner} needs transformers and Pillow",
            got=str(error),
            fix="pip install 'distillens[semantics]'",
        ) from error
    folder = Path(name).expanduser()
    local = folder.is_dir()
    place = str(folder) if local else name
    # Layers that a checkpoint lacks are drawn from the global generator, which is the host program's.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            processor = transformers.AutoProcessor.from_pretrained(
                place, local_files_only=local, backend="pil"
            )
            model = getattr(transformers, kind).from_pretrained(place, local_files_only=local)
        except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{owner}: the model {name!r} cannot be loaded",
                got=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
                expected="a folder with a model of transformers, or a name on the hub and a network to reach it",
            ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), processor
