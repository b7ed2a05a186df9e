"""Attributes by the text that a CLIP model finds nearest to an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distillens.attributes import Attributes
from distillens.attributes._questions import (
    CACHE,
    Ask,
    Question,
    answered,
    from_transformers,
    identity,
    parse,
)
from distillens.core.checks import UserError, at_least
from distillens.core.dataset import Dataset

PROMPTS = (
    "background (a photo with {} in the background): sky, grass, water, sand, snow, trees, a road, buildings, a room,"
    " a plain wall;"
    "colour (a photo of a {} object): red, orange, yellow, green, blue, purple, pink, brown, black, white, grey;"
    "view (a photo of an object seen {}): from the front, from the side, from behind, from above, from below;"
    "position (a photo with the object {}): on the left, in the centre, on the right, at the top, at the bottom;"
    "size (a photo {}): of a small object far away, of an object in the middle distance, of a large object close up;"
    "number (a photo of {}): one object, two objects, many objects;"
    "light (a photo taken {}): in bright daylight, on a cloudy day, in the dark, at sunset|in warm evening light"
)


@dataclass(frozen=True)
class Clip:
    """Zero-shot attributes: of each prompt's answers the one whose text is nearest to the image.

    ``model`` is a name on the hub or a local folder. ``prompts`` are written NAME (TEXT WITH {}): ANSWER, ANSWER, ... and divided by semicolons;
    an answer with several wordings (``sunset|evening``) is their mean. Answers are kept in the folder ``cache``, one by one.

    Source: Radford et al. 2021, section 3.1.4 (prompts and their means).
    """

    model: str = "openai/clip-vit-base-patch32"
    prompts: str = PROMPTS
    batch: int = 64
    cache: str = CACHE

    def __post_init__(self) -> None:
        at_least(1, "clip", batch=self.batch)
        for question in parse(self.prompts):
            if "{}" not in question.text:
                raise UserError(
                    f"clip: the prompt {question.name!r} has no place for its answers",
                    got=repr(question.text),
                    expected="{} where the answer goes",
                )

    def __call__(self, data: Dataset, fit: Dataset) -> Attributes:
        """The attributes of ``data``.

        Raises:
            UserError: the model cannot be loaded, or answers cannot be kept.
        """
        questions = parse(self.prompts)
        said = answered(
            data,
            questions,
            asked=lambda q: [q.text, [list(answer) for answer in q.answers]],
            model=identity(self.model),
            cache=self.cache,
            batch=self.batch,
            loaded=lambda: _asking(self.model),
        )
        columns = [[q.words.index(word) for word in said[q.name]] for q in questions]
        return Attributes({q.name: q.words for q in questions}, torch.tensor(columns).T)


def _asking(name: str) -> Ask:
    model, processor = from_transformers(name, "CLIPModel", "clip")
    texts: dict[Question, torch.Tensor] = {}

    def embedded(question: Question) -> torch.Tensor:
        """The direction of each answer [answers, d]."""
        if question not in texts:
            means = []
            for answer in question.answers:
                lines = [question.text.replace("{}", word) for word in answer]
                words = processor(text=lines, return_tensors="pt", padding=True, truncation=True)
                found = _unit(model.get_text_features(**words.to(model.device)).pooler_output)
                means.append(_unit(found.mean(0)))
            texts[question] = torch.stack(means)
        return texts[question]

    def ask(pictures: list[Any], questions: Sequence[Question]) -> Iterator[tuple[Question, list[str]]]:
        with torch.no_grad():
            seen = processor(images=pictures, return_tensors="pt").to(model.device)
            images = _unit(model.get_image_features(**seen).pooler_output)
            for question in questions:
                nearest = (images @ embedded(question).T).argmax(1)
                yield question, [question.words[i] for i in nearest.tolist()]

    return ask


def _unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)
