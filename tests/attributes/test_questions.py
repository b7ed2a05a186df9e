"""Models that are asked: tiny random ones, saved to a folder and loaded by the real code; answers kept one by one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distillens.attributes import _questions, clip, vlm
from distillens.attributes._questions import Ask, Question, answered, identity, parse, pictures
from distillens.attributes.clip import PROMPTS, Clip
from distillens.attributes.vlm import QUESTIONS, VLM
from distillens.core.checks import UserError
from distillens.core.dataset import Dataset
from distillens.core.labels import Hard
from distillens.core.rng import Key
from distillens.core.space import Pixel, Standardised

BACKGROUND = Question("background", "What is behind it?", (("sky", "clouds"), ("grass", "green lawn")))


def colours(count: int, channels: int = 3) -> Dataset:
    images = Key(4).uniform(count, channels, 8, 12)
    return Dataset(images, Hard(torch.zeros(count, dtype=torch.long)), ("a", "b"), Pixel())


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ("Sky.", 0),
        ("a blue sky over grass", 0),
        ("Grass, under a cloudy sky", 1),
        ("It is a GREEN LAWN", 1),
        ("clouds", 0),
        ("skyscraper", 2),  # whole words only
        ("", 2),
        ("no idea", 2),
    ],
)
def test_a_free_answer_falls_into_the_closed_set(said: str, place: int) -> None:
    assert BACKGROUND.place(said) == place


def test_an_answer_may_be_written_in_capitals() -> None:
    assert Question("a", "", (("TV", "Screen"), ("Sky",))).place("a screen below the sky") == 0


def test_the_longer_of_two_words_at_one_place_counts() -> None:
    assert Question("a", "", (("light",), ("light blue",))).place("light blue, I think") == 1


def test_questions_are_read_from_text() -> None:
    text = " background (What is behind it?): sky|clouds , grass|green lawn ; size (How big?): small, large;"
    assert parse(text) == (BACKGROUND, Question("size", "How big?", (("small",), ("large",))))


@pytest.mark.parametrize("text", [PROMPTS, QUESTIONS])
def test_the_questions_that_come_with_it_are_whole(text: str) -> None:
    questions = parse(text)
    assert len(questions) >= 6
    assert all(question.place(word) == i for question in questions for i, word in enumerate(question.words))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "questions need names, all different; got no question"),
        ("a (b?): x, y; a (c?): x, y", "questions need names, all different; got a, a"),
        ("a: x, y", "a question is not written as it should be; got 'a: x, y'"),
        ("a (b?): x", "a question is not written as it should be"),
        ("a (b?): x,, y", "a question is not written as it should be"),
        ("a (b?): x|y, y", "the question 'a' has the word 'y' twice"),
        ("a (b?): x, other", "the question 'a' has the answer 'other'"),
    ],
)
def test_questions_written_otherwise_are_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said.replace("?", r"\?").replace("(", r"\(").replace(")", r"\)")):
        VLM(questions=text)


def test_a_prompt_needs_a_place_for_its_answers() -> None:
    with pytest.raises(UserError, match="clip: the prompt 'a' has no place for its answers"):
        Clip(prompts="a (a photo): x, y")


class Asked:
    """A model in whose place stands the picture's mean level; it remembers what it was asked."""

    def __init__(self) -> None:
        self.times: list[tuple[str, int]] = []

    def loaded(self) -> Ask:
        def ask(shown: list[Any], questions: Sequence[Question]) -> Iterator[tuple[Question, list[str]]]:
            for question in questions:
                self.times.append((question.name, len(shown)))
                yield question, [f"{question.name} {sum(image.tobytes())}" for image in shown]

        return ask

    def __call__(self, data: Dataset, cache: Path, names: Sequence[str] = ("a", "b")) -> dict[str, list[str]]:
        return answered(
            data,
            [Question(name, name, (("x",), ("y",))) for name in names],
            asked=lambda q: q.text,
            model="m",
            cache=str(cache),
            batch=4,
            loaded=self.loaded,
        )


def test_an_answer_is_asked_for_once(tmp_path: Path) -> None:
    first, again, more, other = Asked(), Asked(), Asked(), Asked()
    data = colours(10)
    said = first(data, tmp_path)
    assert first.times == [("a", 4), ("b", 4), ("a", 4), ("b", 4), ("a", 2), ("b", 2)]
    assert said["a"] == [f"a {sum(image.tobytes())}" for image in pictures(data)]
    assert again(data, tmp_path) == said
    assert again.times == []
    # Another order, an image that is there twice, and some that are new.
    wanted = torch.tensor([3, 3, 9, 0])
    assert again(data.take(wanted), tmp_path)["b"] == [said["b"][i] for i in wanted.tolist()]
    assert again.times == []
    more(colours(13), tmp_path)
    assert more.times == [("a", 3), ("b", 3)]
    assert other(data, tmp_path, ("a", "c"))["a"] == said["a"]
    assert {name for name, _ in other.times} == {"c"}
    lines = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == 13 * 2 + 10
    assert {"image", "model", "question", "answer"} == set(lines[0])


def test_a_torn_line_is_no_answer(tmp_path: Path) -> None:
    data, first, again = colours(8), Asked(), Asked()
    said = first(data, tmp_path, ("a",))
    (path,) = tmp_path.glob("*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert again(data, tmp_path, ("a",)) == said
    assert again.times == [("a", 1)]
    third = Asked()
    assert third(data, tmp_path, ("a",)) == said
    assert third.times == []  # what followed the torn line stands on a line of its own
    assert [line for line in path.read_bytes().split(b"\n") if line][-1] == whole.split(b"\n")[-2]


KILLED = """
import os, signal, sys
import tests.attributes.test_questions as here
class Killed(here.Asked):
    def loaded(self):
        ask = super().loaded()
        def once(shown, questions):
            yield from ask(shown, questions)
            if len(self.times) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return once
Killed()(here.colours(10), here.Path(sys.argv[1]), ("a",))
"""


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[2], capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    rest, whole = Asked(), Asked()
    said = rest(colours(10), tmp_path, ("a",))
    assert rest.times == [("a", 2)]
    assert said == whole(colours(10), tmp_path / "fresh", ("a",))


def test_answers_that_cannot_be_kept_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"answers cannot be kept in .*name another folder: set the source's cache"
    ):
        Asked()(colours(2), tmp_path / "file")


def test_a_folder_is_another_model_when_its_files_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = identity(str(tmp_path))
    assert identity(str(tmp_path)) == before != identity("some/name") == "some/name"
    (tmp_path / "config.json").write_text("{ }")
    assert identity(str(tmp_path)) != before


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for source in (Clip(cache=str(tmp_path)), VLM(cache=str(tmp_path))):
        with pytest.raises(
            UserError, match=r"needs transformers and Pillow.*pip install 'distillens\[semantics\]'"
        ):
            source(colours(2), colours(2))


def test_pictures_are_what_a_person_sees() -> None:
    """Rows, columns and channels in their places, clamped, the same in every space; one channel is shown as grey."""
    data = colours(2)
    images = data.images * 1.4 - 0.2  # distilled pixels leave [0, 1]
    data = Dataset(images, data.labels, data.classes, data.space)
    moved = data.to_space(Standardised((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    for shown in (pictures(data), pictures(moved)):
        for picture, image in zip(shown, images, strict=True):
            assert picture.size == (12, 8)
            for y, x in ((0, 0), (2, 7), (7, 3)):
                for level, value in zip(picture.getpixel((x, y)), image[:, y, x].tolist(), strict=True):
                    assert abs(level - 255 * min(1, max(0, value))) < 0.51
    for picture in pictures(colours(2, channels=1)):
        red, green, blue = picture.split()
        assert red.tobytes() == green.tobytes() == blue.tobytes()


def test_two_models_do_not_share_answers(tmp_path: Path) -> None:
    first = _questions.Answers(tmp_path, "a", "q", "asked")
    first.add({"image": "x"})
    assert _questions.Answers(tmp_path, "a", "q", "asked").known == {"image": "x"}
    assert _questions.Answers(tmp_path, "b", "q", "asked").known == {}
    assert _questions.Answers(tmp_path, "a", "q", "other").known == {}


def test_a_model_is_loaded_to_be_asked_and_draws_nothing_of_the_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers that a checkpoint lacks are drawn when it is loaded; a fresh module is in training mode."""

    def loaded(*_: Any, **__: Any) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())

    kind = SimpleNamespace(from_pretrained=loaded)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoProcessor=kind, CLIPModel=kind))
    before = torch.get_rng_state()
    model, _ = _questions.from_transformers("name", "CLIPModel", "clip")
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(part.training for part in model.modules())


# In the models' place stand functions that are known: what is sent, what is read, and what is asked again.


class Sent(dict[str, torch.Tensor]):
    """A processor's batch."""

    def to(self, _: Any) -> Sent:
        return self


class Directions:
    """A CLIP model: every image lies in the first direction, each line of text where ``lines`` says."""

    device = "cpu"

    def __init__(self, lines: dict[str, tuple[float, float]]) -> None:
        self.lines = lines
        self.asked: list[str] = []

    def __call__(self, text: Sequence[str] = (), images: Sequence[Any] = (), **_: Any) -> Sent:
        self.asked += text
        found = [self.lines.get(line, (0.0, 1.0)) for line in text] or [(2.0, 0.0)] * len(images)
        return Sent(x=torch.tensor(found))

    def get_text_features(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(pooler_output=x)

    get_image_features = get_text_features


@pytest.mark.parametrize(
    ("near", "far"),
    [
        # Each wording is one vote, however long: the mean direction is at 45 degrees, of the lengths at 84.
        (((1.0, 0.0), (0.0, 10.0)), ((0.6, 0.8),)),
        # The mean's direction counts, not how far its wordings lie apart.
        (((0.2, 0.98), (0.2, -0.98)), ((0.7, 0.7),)),
    ],
)
def test_an_answer_of_several_wordings_is_their_mean_direction(
    near: Sequence[tuple[float, float]],
    far: Sequence[tuple[float, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = {f"is {word}": place for word, place in zip("abc", (*near, *far), strict=True)}
    model = Directions(lines)
    monkeypatch.setattr(clip, "from_transformers", lambda *_: (model, model))
    found = Clip("m", "first (is {}): c, a|b; second (is {}): a|b, c", 2, str(tmp_path))(
        colours(3), colours(1)
    )
    assert found.words == {"first": ("c", "a"), "second": ("a", "c")}
    assert found.values.tolist() == [[1, 0]] * 3
    assert sorted(model.asked) == sorted(2 * ["is a", "is b", "is c"])  # once a question, not once a batch


@pytest.mark.parametrize(
    "other", [{"model": "n"}, {"prompts": "q (was {}): a|b, c"}, {"prompts": "q (is {}): a, c"}]
)
def test_clip_is_asked_again_where_anything_that_it_is_sent_is_another(
    other: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Directions({})
    monkeypatch.setattr(clip, "from_transformers", lambda *_: (model, model))
    first = Clip("m", "q (is {}): a|b, c", 2, str(tmp_path))
    for source, times in ((first, 1), (first, 1), (replace(first, **other), 2)):
        source(colours(1), colours(1))
        assert sum(line.endswith(" c") for line in model.asked) == times


class Parrot:
    """A language model that says how it was asked; tokens are characters, the first two of each line are marks."""

    device = "cpu"
    chat_template: str | None = None

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.settings: list[dict[str, Any]] = []

    def __call__(self, images: Sequence[Any], text: Sequence[str], **_: Any) -> Sent:
        assert len(images) == len(text)
        self.asked.append((text[0], len(text)))
        return Sent(input_ids=torch.tensor([[ord(mark) for mark in line] for line in text]))

    def generate(self, input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        self.settings.append(settings)
        said = "red" if "colour" in self.asked[-1][0] else "grass, no sky"
        new = torch.tensor([ord(mark) for mark in f"##{said}"]).expand(len(input_ids), -1)
        return torch.cat([input_ids, new], 1)

    def batch_decode(self, tokens: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        lines = ["".join(map(chr, line)) for line in tokens.tolist()]
        return [line.replace("#", "" if skip_special_tokens else "sky ") for line in lines]

    def apply_chat_template(self, messages: list[Any], *, add_generation_prompt: bool, tokenize: bool) -> str:
        assert add_generation_prompt
        assert not tokenize
        ((image, text),) = [message["content"] for message in messages]
        assert image == {"type": "image"}
        return f"<{messages[0]['role']}> {text['text']}"


TWO = "place (What is there?): sky, grass; look (Which colour?): red, green"


@pytest.mark.parametrize("template", [None, "one"])
def test_a_language_model_is_sent_each_question_and_its_words_alone_are_read(
    template: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Parrot()
    model.chat_template = template
    monkeypatch.setattr(vlm, "from_transformers", lambda *_: (model, model))
    found = VLM("m", TWO, 5, 2, str(tmp_path))(colours(3), colours(1))
    assert found.words == {"place": ("sky", "grass", "other"), "look": ("red", "green", "other")}
    assert found.values.tolist() == [[1, 0]] * 3
    sent = [
        "What is there? Answer with one of these words: sky, grass, other.",
        "Which colour? Answer with one of these words: red, green, other.",
    ]
    written = "<user> {}" if template else "USER: <image>\n{} ASSISTANT:"
    assert model.asked == [(written.format(text), count) for count in (2, 1) for text in sent]
    assert model.settings == [{"do_sample": False, "max_new_tokens": 5}] * 4


@pytest.mark.parametrize(
    "other",
    [
        {"model": "n"},
        {"tokens": 6},
        {"questions": "place (What is here?): sky, grass; look (Which colour?): red, green"},
    ],
)
def test_a_language_model_is_asked_again_where_anything_that_it_is_sent_is_another(
    other: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Parrot()
    monkeypatch.setattr(vlm, "from_transformers", lambda *_: (model, model))
    first = VLM("m", TWO, 5, 2, str(tmp_path))
    for source, times in ((first, 1), (first, 1), (replace(first, **other), 2)):
        source(colours(1), colours(1))
        assert sum("there" in text or "here" in text for text, _ in model.asked) == times


# From here on with transformers: tiny random models, as the hub's are saved.


@pytest.fixture(scope="module")
def hub() -> Any:
    """Transformers, kept from the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        transformers = pytest.importorskip("transformers")
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        yield transformers


def tokenizer(transformers: Any, words: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>", *words.split()]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=["<image>"], **marks
    )


TINY = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
SIGHT = {**TINY, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}


def image_processor(transformers: Any) -> Any:
    return transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )


@pytest.fixture(scope="module")
def tiny_clip(hub: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP model of random weights in a folder."""
    folder = tmp_path_factory.mktemp("clip")
    words = tokenizer(hub, "a photo of sky grass red green thing")
    marks = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    text = {**TINY, **marks, "vocab_size": len(words), "num_hidden_layers": 1, "max_position_embeddings": 16}
    config = hub.CLIPConfig(text_config=text, vision_config=SIGHT, projection_dim=8)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        hub.CLIPModel(config).save_pretrained(folder)
    hub.CLIPProcessor(image_processor=image_processor(hub), tokenizer=words).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny_llava(hub: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LLaVA model of random weights in a folder."""
    folder = tmp_path_factory.mktemp("llava")
    words = tokenizer(hub, "USER ASSISTANT what is behind it sky grass red green , : .")
    language = hub.LlamaConfig(
        **TINY, vocab_size=len(words), num_hidden_layers=1, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    config = hub.LlavaConfig(vision_config=SIGHT, text_config=language.to_dict(), image_token_index=4)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = hub.LlavaForConditionalGeneration(config)
    model.lm_head.weight.data[:5] = 0  # so that it says words, not marks
    model.save_pretrained(folder)
    hub.LlavaProcessor(
        image_processor=image_processor(hub),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    ).save_pretrained(folder)
    return str(folder)


ASKED = "background (a photo of {}): sky, grass|green grass; colour (a {} thing): red, green, sky"


def test_clip_answers_with_the_nearest_text(hub: Any, tiny_clip: str, tmp_path: Path) -> None:
    data, before = colours(12), torch.get_rng_state()
    source = Clip(tiny_clip, ASKED, 5, str(tmp_path))
    found = source(data, data)
    assert found.words == {"background": ("sky", "grass"), "colour": ("red", "green", "sky")}
    assert torch.equal(torch.get_rng_state(), before)
    # The slow twin: one image and one text at a time.
    model, processor = hub.CLIPModel.from_pretrained(tiny_clip), hub.AutoProcessor.from_pretrained(tiny_clip)
    model.eval()

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x / x.norm()

    def text(line: str) -> torch.Tensor:
        asked = processor(text=[line], return_tensors="pt")
        return unit(model.get_text_features(**asked).pooler_output[0])

    grass = unit((text("a photo of grass") + text("a photo of green grass")) / 2)
    answers = [
        [text("a photo of sky"), grass],
        [text("a red thing"), text("a green thing"), text("a sky thing")],
    ]
    with torch.no_grad():
        for i, picture in enumerate(pictures(data)):
            seen = processor(images=[picture], return_tensors="pt")
            image = unit(model.get_image_features(**seen).pooler_output[0])
            for column, texts in enumerate(answers):
                near = [float(image @ one) for one in texts]
                assert near[int(found.values[i, column])] == pytest.approx(max(near), abs=1e-5)


def test_clip_takes_one_channel_and_needs_no_model_for_what_it_knows(
    tiny_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = colours(6, channels=1)
    source = Clip(tiny_clip, ASKED, 4, str(tmp_path))
    found = source(data, data)
    monkeypatch.setattr(clip, "from_transformers", lambda *_: pytest.fail("the model was loaded again"))
    assert torch.equal(source(data, data).values, found.values)


@pytest.mark.parametrize("template", [False, True])
def test_a_language_model_is_asked_and_its_words_are_mapped(
    hub: Any, tiny_llava: str, tmp_path: Path, template: bool
) -> None:
    data, before = colours(7), torch.get_rng_state()
    if template:
        processor = hub.AutoProcessor.from_pretrained(tiny_llava)
        processor.chat_template = (
            "{% for m in messages %}USER: {% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}"
            "{{ c.text }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
        )
        folder = tmp_path / "templated"
        hub.LlavaForConditionalGeneration.from_pretrained(tiny_llava).save_pretrained(folder)
        processor.save_pretrained(folder)
        tiny_llava = str(folder)
    text = "background (what is behind it?): sky, grass; colour (red green?): red, green"
    source = VLM(tiny_llava, text, 4, 3, str(tmp_path / "answers"))
    found = source(data, data)
    assert found.words == {"background": ("sky", "grass", "other"), "colour": ("red", "green", "other")}
    assert torch.equal(torch.get_rng_state(), before)
    # The slow twin: one image at a time, the next word by one forward pass each.
    model = hub.LlavaForConditionalGeneration.from_pretrained(tiny_llava).eval()
    processor = hub.AutoProcessor.from_pretrained(tiny_llava)
    sent = "what is behind it? Answer with one of these words: sky, grass, other."
    mark = "<image>" if template else "<image>\n"
    for i, picture in enumerate(pictures(data)):
        seen = processor(images=[picture], text=[f"USER: {mark}{sent} ASSISTANT:"], return_tensors="pt")
        tokens: list[int] = []
        with torch.no_grad():
            for _ in range(4):
                ids = torch.cat([seen["input_ids"], torch.tensor([tokens], dtype=torch.long)], 1)
                logits = model(input_ids=ids, pixel_values=seen["pixel_values"]).logits
                tokens.append(int(logits[0, -1].argmax()))
                if tokens[-1] == 2:
                    break
        said = processor.tokenizer.decode(tokens, skip_special_tokens=True)
        assert found.values[i, 0] == parse(text)[0].place(said), said


def test_a_folder_without_a_model_is_refused(hub: Any, tmp_path: Path) -> None:
    for source in (Clip(str(tmp_path), cache=str(tmp_path)), VLM(str(tmp_path), cache=str(tmp_path))):
        with pytest.raises(
            UserError, match=r"the model .* cannot be loaded.*expected a folder with a model of transformers"
        ):
            source(colours(2), colours(2))


def test_neighbours_share_what_asks() -> None:
    assert clip.from_transformers is vlm.from_transformers is _questions.from_transformers
