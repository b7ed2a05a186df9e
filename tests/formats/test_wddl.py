"""Distilled files of others come in number by number, or are refused in words: the layouts ``wddl`` and ``dc``."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distillens import cli, formats, pipeline
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.config import describe, restore
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard
from distillens.core.rng import Key
from distillens.core.space import Pixel, Standardised, Zca
from distillens.formats.dc import DC
from distillens.formats.mtt_buffer import MTTBuffer
from distillens.formats.wddl import WDDL
from distillens.nets import made_with
from distillens.nets.convnet import ConvNet

K = 4
PAPERS = WDDL()
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]  # as the field's code has them, typed again


def real(space: Any = None) -> Splits:
    """Colour images of 8 x 8 in four classes, standardised with constants of their own."""
    pixels = Key(3).fold("real").uniform(40, 3, 8, 8)
    space = space or Standardised((0.5, 0.45, 0.4), (0.3, 0.25, 0.2))

    def part(start: int, stop: int) -> Dataset:
        labels = Hard(torch.arange(stop - start) % K)
        return Dataset(space.from_pixels(pixels[start:stop]), labels, ("a", "b", "c", "d"), space)

    return Splits(part(0, 24), part(24, 32), part(32, 40), "theirs")


def numbers(per_class: int = 2) -> dict[str, torch.Tensor]:
    images = Key(4).fold("images").normal(K * per_class, 3, 8, 8)
    return {"data": images, "label": torch.arange(K).repeat_interleave(per_class)}


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def refusal(path: Path, layout: Any = PAPERS, data: Splits | None = None) -> str:
    with pytest.raises(UserError) as error:
        layout.read(path, data or real())
    return str(error.value)


# ---- what comes in ----


def test_the_room_says_what_each_layout_holds() -> None:
    assert {name: formats.room.find(name).holds for name in formats.room.names()} == {
        "dc": "sets",
        "mtt_buffer": "experts",
        "wddl": "sets",
    }
    assert WDDL.recognises(Path("DD_data/3.pt")) and not WDDL.recognises(Path("images_best.pt"))
    assert DC.recognises(Path("res_DC_CIFAR10_ConvNet_10ipc.pt")) and not DC.recognises(Path("3.pt"))
    assert not MTTBuffer.recognises(Path("3.pt"))


@pytest.mark.parametrize("layout", [WDDL(), WDDL((0.1,), (0.2,)), DC(), DC(2, (0.1,), (0.2,))])
def test_settings_come_back_from_json(layout: Any) -> None:
    assert restore(describe(layout)) == layout


def test_numbers_are_brought_into_the_space_of_the_data(tmp_path: Path) -> None:
    given = numbers()
    found = WDDL().read(saved(tmp_path / "0.pt", given), real())
    expected = torch.empty_like(given["data"])
    for c, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        pixels = given["data"][:, c] * std + mean
        expected[:, c] = (pixels - (0.5, 0.45, 0.4)[c]) / (0.3, 0.25, 0.2)[c]
    torch.testing.assert_close(found.stored["images"], expected)
    assert torch.equal(found.labels.hard(), given["label"])
    assert found.classes == ("a", "b", "c", "d")
    assert found.provenance is None and found.ipc == 2


def test_the_same_constants_leave_the_very_numbers(tmp_path: Path) -> None:
    given = numbers()
    found = WDDL().read(saved(tmp_path / "0.pt", given), real(Standardised(tuple(MEAN), tuple(STD))))
    assert torch.equal(found.stored["images"], given["data"])


def test_they_come_into_pixels_and_whitened_spaces(tmp_path: Path) -> None:
    given = numbers()
    path = saved(tmp_path / "0.pt", given)
    pixels = given["data"] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    torch.testing.assert_close(WDDL().read(path, real(Pixel())).stored["images"], pixels)
    space = Zca.fit(real(Pixel()).train.images)
    whitened = WDDL().read(path, real(space))
    assert whitened.space is space
    torch.testing.assert_close(whitened.dataset().pixels(), pixels, atol=1e-3, rtol=1e-3)


def test_other_constants_are_a_setting(tmp_path: Path) -> None:
    given = numbers()
    path = saved(tmp_path / "0.pt", given)
    plain = WDDL(mean=(0, 0, 0), std=(1, 1, 1)).read(path, real(Pixel()))
    torch.testing.assert_close(plain.stored["images"], given["data"])


def test_tensors_with_gradients_and_of_an_accelerator_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = numbers()
    images = torch.nn.Parameter(given["data"].double())
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path = saved(tmp_path / "0.pt", {"data": images, "label": given["label"].int()})
    assert b"cuda:0" in path.read_bytes()
    found = WDDL().read(path, real()).stored["images"]
    assert (found.device.type, found.dtype, found.requires_grad) == ("cpu", torch.float32, False)
    torch.testing.assert_close(
        found, WDDL().read(saved(tmp_path / "1.pt", given), real()).stored["images"], atol=1e-6, rtol=1e-6
    )


def test_old_files_load_too(tmp_path: Path) -> None:
    given = numbers()
    torch.save(given, tmp_path / "0.pt", _use_new_zipfile_serialization=False)
    new = WDDL().read(saved(tmp_path / "1.pt", given), real())
    assert torch.equal(WDDL().read(tmp_path / "0.pt", real()).stored["images"], new.stored["images"])


def test_a_file_may_be_written_over_afterwards(tmp_path: Path) -> None:
    path = saved(tmp_path / "0.pt", numbers())
    found = WDDL().read(path, real(Standardised(tuple(MEAN), tuple(STD))))
    before = found.stored["images"].clone()
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(found.stored["images"], before)


def test_of_dcs_files_the_last_item_comes_in(tmp_path: Path) -> None:
    many = [numbers(), {**numbers(), "data": 2 * numbers()["data"]}]
    pairs = [[one["data"], one["label"]] for one in many]
    accuracies = {"ConvNet": [np.float64(0.43), 0.44], "MLP": [np.float64(0.2)]}
    path = saved(tmp_path / "res_DC.pt", {"data": pairs, "accs_all_exps": accuracies})
    space = Standardised(tuple(MEAN), tuple(STD))
    assert torch.equal(DC().read(path, real(space)).stored["images"], many[1]["data"])
    assert torch.equal(DC(item=0).read(path, real(space)).stored["images"], many[0]["data"])
    assert "has no such item; got 2; expected 0 to 1, or -1 for the last" in refusal(path, DC(item=2))


# ---- a run folder ----


def test_a_file_becomes_a_run_folder_that_says_where_it_came_from(tmp_path: Path) -> None:
    path = saved(tmp_path / "0.pt", numbers())
    made = pipeline.import_(path, "wddl", real(), to=tmp_path / "run", name="bptt", net="convnet")
    assert isinstance(made, DistilledDataset)
    again = DistilledDataset.load(tmp_path / "run")
    assert again.fingerprint == made.fingerprint
    about = again.provenance
    assert about is not None
    assert (about.method, about.ipc, about.data, about.data_fingerprint) == (
        "bptt",
        2,
        "theirs",
        real().fingerprint,
    )
    assert about.inputs == {"file": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert about.settings["imported"] == {"is": "distillens.formats.wddl.WDDL", "mean": MEAN, "std": STD}
    assert made_with(again) == ConvNet.defaults(real().train)
    first = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    pipeline.import_(path, "wddl", real(), to=tmp_path / "run", name="bptt", net="convnet")
    assert first == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


def test_name_and_network_are_not_made_up(tmp_path: Path) -> None:
    path = saved(tmp_path / "theirs.pt", numbers())
    made = pipeline.import_(path, "wddl", real(), to=tmp_path / "run")
    assert isinstance(made, DistilledDataset) and made.provenance is not None
    assert made.provenance.method == "theirs"
    assert made_with(made) is None


def test_a_taken_folder_is_refused_and_emptied_by_force(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "0.pt", numbers()), saved(tmp_path / "1.pt", numbers(3))
    pipeline.import_(first, "wddl", real(), to=tmp_path / "run", name="dm")
    with pytest.raises(UserError, match="was made with other settings"):
        pipeline.import_(second, "wddl", real(), to=tmp_path / "run", name="dm")
    made = pipeline.import_(second, "wddl", real(), to=tmp_path / "run", name="dm", force=True)
    assert len(made) == 12 and len(DistilledDataset.load(tmp_path / "run")) == 12
    with pytest.raises(UserError, match="was made with other settings"):
        pipeline.distill("random_subset", real(), to=tmp_path / "run")


def test_imported_experts_take_no_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="imported experts have no name; got 'a'; leave --name out"):
        pipeline.import_(tmp_path, "mtt_buffer", real(), to=tmp_path / "x", name="a")


def test_the_command_imports_evaluates_and_reports(
    digits: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Class means of digits in pixels, as a foreign file: in, evaluated, and on a page."""
    means = torch.stack([digits.train.pixels()[m].mean(0) for m in digits.train.by_class])
    path = saved(tmp_path / "0.pt", {"data": means, "label": torch.arange(10)})
    run = str(tmp_path / "means")

    def command(*words: str) -> str:
        cli.app(list(words), standalone_mode=False)
        return capsys.readouterr().out

    said = command(
        *("import", str(path), "--from", "wddl", "--data", "digits", "--to", run, "--name", "means"),
        *("--set", "mean=0", "--set", "std=1"),
    )
    assert said == f"10 points in {run}: next, distillens evaluate {run}\n"
    torch.testing.assert_close(
        DistilledDataset.load(Path(run)).stored["images"],
        torch.stack([digits.train.images[m].mean(0) for m in digits.train.by_class]),
        atol=1e-5,
        rtol=1e-5,
    )
    again = json.loads(
        command(
            *("import", str(path), "--from", "wddl", "--to", run, "--name", "means"),
            *("--set", "mean=0", "--set", "std=1", "--json"),
        )
    )
    assert again == {
        "folder": run,
        "fingerprint": DistilledDataset.load(Path(run)).fingerprint,
        "points": 10,
    }
    assert "Accuracy after training on the set" in command("evaluate", run, "--nets", "1")
    assert Path(json.loads(command("report", run, "--json"))["report"]).is_file()


# ---- what is refused ----


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('run')",))


@pytest.mark.parametrize("layout", [WDDL(), DC()])
def test_a_file_that_would_run_code_is_refused(tmp_path: Path, layout: Any) -> None:
    bomb = Bomb()
    said = refusal(saved(tmp_path / "0.pt", {**numbers(), "more": bomb}), layout)
    assert re.search(
        r"0.pt is refused: reading it would run code from the file; got a call of \S*exec; expected a dict",
        said,
    )
    (tmp_path / "1.pt").write_bytes(pickle.dumps(bomb))
    said = refusal(tmp_path / "1.pt", layout)
    assert re.search("is refused: reading it would run code|is not a distilled set", said)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"", "a file that torch.load cannot read"),
        (b"\x89PNG not a set", "a file that torch.load cannot read"),
        (b"PK\x03\x04 cut short", "a file that torch.load cannot read"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, got: str) -> None:
    (tmp_path / "0.pt").write_bytes(content)
    said = refusal(tmp_path / "0.pt")
    assert f"0.pt is not a distilled set; got {got}" in said
    assert 'expected a dict {"data": images [n, channels, height, width], "label": classes [n]}' in said


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "0.pt", numbers())
    path.write_bytes(path.read_bytes()[:3000])
    assert "0.pt is not a distilled set; got a file that torch.load cannot read" in refusal(path)


def test_a_missing_file_is_told_as_such(tmp_path: Path) -> None:
    assert f"there is no file {tmp_path / '0.pt'}; check the spelling" in refusal(tmp_path / "0.pt")


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ([torch.zeros(2)], "a list"),
        (torch.zeros(2), "a Tensor"),
        ({}, "a dict of nothing"),
        ({"data": torch.zeros(2)}, "a dict of 'data'"),
    ],
)
def test_other_values_are_refused(tmp_path: Path, value: Any, got: str) -> None:
    path = saved(tmp_path / "0.pt", value)
    assert f"0.pt is not a distilled set; got {got}; expected a dict" in refusal(path)
    assert f"0.pt is not a distilled set; got {got}; expected a dict" in refusal(path, DC())


@pytest.mark.parametrize("items", [[], [[torch.zeros(2)]], torch.zeros(2), [torch.zeros(2, 3)]])
def test_other_items_are_refused(tmp_path: Path, items: Any) -> None:
    path = saved(tmp_path / "0.pt", {"data": items, "accs_all_exps": {}})
    assert "is not a distilled set; got a dict of 'data', 'accs_all_exps'; expected" in refusal(path, DC())


def changed(**changes: Any) -> dict[str, Any]:
    return {**numbers(), **changes}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (changed(data=[1.0]), "0.pt: its images are not a tensor; got a list"),
        (changed(label="a"), "0.pt: its labels are not a tensor; got a str"),
        (
            changed(data=torch.zeros(8, 3, 8, 8).to_sparse()),
            "0.pt: its images are not plain numbers; got a tensor of torch.float32, torch.sparse_coo",
        ),
        (
            changed(data=torch.zeros(8, 3, 32, 32)),
            "its images do not fit the data; got torch.float32 of shape (8, 3, 32, 32); "
            "expected float numbers of shape [n, 3, 8, 8]; name the data that they were made from with --data",
        ),
        (
            changed(data=torch.zeros(8, 3, 8, 8, dtype=torch.uint8)),
            "its images do not fit the data; got torch.uint8",
        ),
        (
            changed(label=torch.zeros(7, dtype=torch.int64)),
            "its labels do not fit its images; got torch.int64 of shape (7,); expected one whole number an image, [8]",
        ),
        (changed(label=torch.eye(4).repeat(2, 1)), "its labels do not fit its images; got torch.float32"),
        (
            changed(label=torch.arange(8)),
            "a label is outside the classes of the data; got labels 0 to 7; expected 0 to 3",
        ),
        (
            changed(label=torch.arange(8) - 1),
            "a label is outside the classes of the data; got labels -1 to 6",
        ),
        (
            changed(label=torch.arange(8) % 2),
            "class 'c' has no image; got 8 images of 2 classes; expected images of all 4 classes of the data",
        ),
        (
            {"data": torch.zeros(0, 3, 8, 8), "label": torch.zeros(0, dtype=torch.int64)},
            "class 'a' has no image; got 0 images of 0 classes",
        ),
        (
            changed(data=numbers()["data"].index_fill(0, torch.tensor([3, 5]), torch.nan)),
            "2 images hold numbers that are not finite; got image 3, the first",
        ),
    ],
)
def test_what_does_not_fit_the_data_is_refused(tmp_path: Path, value: Any, said: str) -> None:
    assert said in refusal(saved(tmp_path / "0.pt", value))


def test_constants_of_other_channels_are_refused(tmp_path: Path) -> None:
    said = refusal(saved(tmp_path / "0.pt", numbers()), WDDL(mean=(0.5,)))
    assert (
        "the constants do not fit the channels of the data; got 1 means and 3 stds; expected 3 of each"
        in said
    )
    assert "--set mean=... --set std=..., 0 and 1 for not at all" in said
    with pytest.raises(UserError, match="std must be above 0"):
        WDDL(std=(0.0, 1.0, 1.0)).read(tmp_path / "0.pt", real())
