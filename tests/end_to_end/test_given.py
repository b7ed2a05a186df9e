"""Sets that are there already in the place of methods: run folders of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distillens import analyses, pipeline, studies
from distillens.core.artefact import DistilledDataset
from distillens.core.checks import UserError
from distillens.core.dataset import Splits
from distillens.given import bring
from distillens.studies import asked


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, digits: Splits) -> list[Path]:
    """Two replicates of one method and one of another, 1 image a class."""
    base = tmp_path_factory.mktemp("given")
    made = []
    for method, replicate in (("dm", 0), ("dm", 1), ("k_means", 0)):
        to = base / f"{method}-{replicate}"
        settings = ["steps=2", "net.width=8"] if method == "dm" else ["net.width=8", "recipe.steps=10"]
        pipeline.distill(method, digits, settings=settings, replicate=replicate, to=to)
        made.append(to)
    return made


def test_folders_of_one_method_are_its_replicates(folders: list[Path], digits: Splits) -> None:
    given = bring([str(folder) for folder in folders], digits)
    assert {name: len(many) for name, many in given.sets.items()} == {"dm": 2, "k_means": 1}
    assert (given.ipc, given.replicates) == (1, 2)
    assert [place for place, _ in given.folders()] == [
        "sets/ipc1/dm/0",
        "sets/ipc1/dm/1",
        "sets/ipc1/k_means/0",
    ]


def test_a_set_can_be_named(folders: list[Path], digits: Splits) -> None:
    given = bring([f"ours={folders[0]}", str(folders[1])], digits)
    assert list(given.sets) == ["ours", "dm"]


def test_a_study_of_given_sets_makes_none_and_keeps_them(
    distillens, folders: list[Path], tmp_path: Path
) -> None:
    arguments = [
        "study", "--to", tmp_path / "study", "--preset", "smoke", "--scale", "0.1",
        "--distilled", ",".join(map(str, folders[:2])),
        "--set", "herding.net.width=8", "--set", "herding.recipe.steps=10",
    ]  # fmt: skip
    done = distillens(*arguments)
    assert done.returncode == 0, done.stderr
    assert "scaled by 0.1: behaviour/mixing: recipe.steps=30" in done.stderr
    kept = DistilledDataset.load(tmp_path / "study/sets/ipc1/dm/1")
    assert kept.fingerprint == DistilledDataset.load(folders[1]).fingerprint
    about = json.loads((tmp_path / "study/study.json").read_text())
    assert {one["name"] for one in about["sets"]} == {"dm", "random_subset", "herding"}
    assert [one["folder"] for one in about["sets"] if one["name"] == "dm"] == [
        "sets/ipc1/dm/0",
        "sets/ipc1/dm/1",
    ]
    assert "behaviour/mixing: recipe.steps=30" in about["scaled"]
    assert "--scale 0.1" in about["command"] and "--distilled" in about["command"]
    again = distillens(*arguments)
    assert "nothing to do" in again.stderr
    other = distillens(*[a if a != arguments[8] else str(folders[0]) for a in arguments])
    assert other.returncode == 2 and "was made with other settings" in other.stderr


def test_one_given_set_is_judged_by_several_networks(folders: list[Path], digits: Splits) -> None:
    study = studies.design(digits, distilled=[str(folders[0])], preset="smoke")
    assert study.methods == () and study.subjects == ("dm",) and study.replicates == 1
    accuracy, mixing = study.questions(1)[:2]
    assert accuracy.protocol.nets == mixing.nets == asked.NETS_OF_ONE


def test_methods_may_stand_beside_given_sets(folders: list[Path], digits: Splits) -> None:
    study = studies.design(digits, distilled=[str(folders[0])], methods=("dc",), preset="smoke")
    assert study.subjects == ("dm", "dc")
    assert {one.name for one in study.orders} == {"dc", "random_subset", "herding"}


@pytest.mark.parametrize(
    ("places", "wishes", "message"),
    [
        ([0, 0], {}, "the set 'dm' is given twice"),
        ([0], {"ipc": (10,)}, "of another size.*leave --ipc out"),
        ([0], {"methods": ("dm",)}, "a method is named twice"),
        (["herding"], {}, "is in every study as a baseline"),
        (["nowhere"], {}, "there is no distilled set"),
        ([0], {"scale": 0.0}, "a share of its size.*above 0, up to 1"),
        ([0], {"scale": 2.0}, "a share of its size"),
    ],
)
def test_what_does_not_fit_is_refused(
    folders: list[Path], digits: Splits, places: list[int | str], wishes: dict[str, object], message: str
) -> None:
    named = {"herding": f"herding={folders[0]}", "nowhere": "nowhere"}
    given = [named[place] if isinstance(place, str) else str(folders[place]) for place in places]
    with pytest.raises(UserError, match=message):
        studies.design(digits, distilled=given, preset="smoke", **wishes)  # type: ignore[arg-type]


def test_a_file_in_the_papers_layout_is_taken_as_it_is(
    folders: list[Path], digits: Splits, tmp_path: Path
) -> None:
    data = DistilledDataset.load(folders[0]).dataset()
    mean = torch.tensor(0.5)
    torch.save({"data": (data.pixels() - mean) / 0.25, "label": data.labels.hard()}, tmp_path / "mtt.pt")
    with pytest.raises(UserError, match="channel"):  # the paper's constants are those of three channels
        bring([str(tmp_path / "mtt.pt")], digits)
    to = tmp_path / "mtt"
    settings = ["mean=0.5", "std=0.25"]
    pipeline.import_(tmp_path / "mtt.pt", "wddl", digits, to=to, settings=settings)
    given = bring([str(to)], digits)
    torch.testing.assert_close(given.sets["mtt"][0].dataset().images, data.images, rtol=0, atol=1e-5)


def test_a_study_may_ask_some_analyses_only(digits: Splits) -> None:
    only = ("pointwise/leave_one_out", "behaviour/pixels")
    study = studies.design(digits, methods=("dm",), only=only, preset="quick")
    assert study.asked == ("behaviour/pixels", "pointwise/leave_one_out")
    assert "--analyses pointwise/leave_one_out,behaviour/pixels" in study.command()
    # Of a question all: those of the preset first, in its order.
    whole = studies.design(digits, methods=("dm",), only=("pointwise",), preset="quick").asked
    assert whole[0] == "pointwise/leave_one_out"
    assert set(whole) == {name for name in analyses.room.names() if name.startswith("pointwise/")}
    paper = studies.design(digits, methods=("dm",), only=("behaviour",), preset="wddl")
    assert paper.asked[:2] == ("behaviour/recognition", "behaviour/feature_map")
    assert "behaviour/sensitivity" not in paper.asked
    with pytest.raises(UserError, match="behaviour/sensitivity is not an experiment of the paper"):
        studies.design(digits, methods=("dm",), only=("behaviour/sensitivity",), preset="wddl")
    with pytest.raises(UserError, match=r"unknown analysis or question 'behavior'.*Did you mean"):
        studies.design(digits, methods=("dm",), only=("behavior",))
