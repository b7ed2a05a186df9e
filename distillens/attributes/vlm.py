"""Attributes by the answers of an image-text model that is asked fixed questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distillens.attributes import Attributes
from distillens.attributes._questions import (
    CACHE,
    OTHER,
    Ask,
    Question,
    answered,
    from_transformers,
    identity,
    parse,
)
from distillens.core.checks import at_least
from distillens.core.dataset import Dataset

QUESTIONS = (
    "background (What is behind the main object?): sky|clouds, grass|lawn|field|meadow, water|sea|ocean|lake|river,"
    " sand|beach|desert, snow|ice, trees|forest|leaves|bush, road|street|runway|pavement|tarmac, building|buildings|city|house,"
    " room|indoors|floor, plain|wall|nothing|blank;"
    "colour (What is the main colour of the object?): red, orange, yellow|gold, green, blue, purple|violet, pink,"
    " brown|tan|beige, black, white, grey|gray|silver;"
    "view (From which side is the object seen?): front, side|profile|left|right, back|behind|rear, above|top, below|underneath;"
    "position (Where in the picture is the object?): left, centre|center|middle, right, top, bottom;"
    "size (How much of the picture does the object fill?): little|small|tiny, half|medium, most|large|all|big|whole;"
    "number (How many objects are there?): one|1|single, two|2|pair, many|several|three|3|four|4|group;"
    "place (Where is the object?): ground|land|grass|road, air|sky|flying, water|sea, indoors|inside;"
    "light (How is the light?): bright|sunny|daylight, dull|cloudy|overcast|grey|gray, dark|night|dim, warm|sunset|evening"
)
WITHOUT_TEMPLATE = "USER: <image>\n{} ASSISTANT:"  # how LLaVA was asked before models brought their own


@dataclass(frozen=True)
class VLM:
    """Answers of a LLaVA-type model to fixed questions, each mapped to a closed set: by whole words and synonyms, else ``other``.

    ``model`` is a name on the hub or a local folder, of any image-text model of transformers. ``questions`` are written
    NAME (TEXT): ANSWER, ANSWER|SYNONYM, ... and divided by semicolons; the model is told the answers. It decodes greedily, ``tokens`` at most.
    Free answers are kept in the folder ``cache``, one by one, and mapped when they are read.

    The paper asks LLaVA; its questions, model size and mapping are not known (its code has none of it).
    """

    model: str = "llava-hf/llava-1.5-7b-hf"
    questions: str = QUESTIONS
    tokens: int = 16
    batch: int = 16
    cache: str = CACHE

    def __post_init__(self) -> None:
        at_least(1, "vlm", tokens=self.tokens, batch=self.batch)
        parse(self.questions)

    def __call__(self, data: Dataset, fit: Dataset) -> Attributes:
        """The attributes of ``data``.

        Raises:
            UserError: the model cannot be loaded, or answers cannot be kept.
        """
        questions = parse(self.questions)
        said = answered(
            data,
            questions,
            asked=lambda q: [sent(q), self.tokens],
            model=identity(self.model),
            cache=self.cache,
            batch=self.batch,
            loaded=lambda: _asking(self.model, self.tokens),
        )
        columns = [[q.place(text) for text in said[q.name]] for q in questions]
        return Attributes({q.name: (*q.words, OTHER) for q in questions}, torch.tensor(columns).T)


def sent(question: Question) -> str:
    """What the model is asked."""
    return f"{question.text} Answer with one of these words: {', '.join((*question.words, OTHER))}."


def _asking(name: str, tokens: int) -> Ask:
    model, processor = from_transformers(name, "AutoModelForImageTextToText", "vlm")

    def prompt(question: Question) -> str:
        if getattr(processor, "chat_template", None) is None:
            return WITHOUT_TEMPLATE.format(sent(question))
        parts = [{"type": "image"}, {"type": "text", "text": sent(question)}]
        text: str = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )
        return text

    def ask(pictures: list[Any], questions: Sequence[Question]) -> Iterator[tuple[Question, list[str]]]:
        for question in questions:
            # Pictures of one size and one question: all rows are of one length, so nothing is padded.
            seen = processor(images=pictures, text=[prompt(question)] * len(pictures), return_tensors="pt")
            with torch.no_grad():
                written = model.generate(**seen.to(model.device), do_sample=False, max_new_tokens=tokens)
            new = written[:, seen["input_ids"].shape[1] :]
            yield (
                question,
                [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)],
            )

    return ask
