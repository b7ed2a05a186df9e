"""Any method in any space: its set is made, saved, loaded and judged through one and the same matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distillens import data, pipeline, studies
from distillens.analyses.behaviour.accuracy import Accuracy
from distillens.core.artefact import DistilledDataset, Provenance
from distillens.core.checks import UserError
from distillens.core.contracts import Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.rng import Key
from distillens.core.space import Pixel, same_space
from distillens.engine.plan import Plan
from distillens.evaluation.published import PROTOCOLS
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import networks, on
from tests.contract.test_distillers import go, names, problem_of, real, tiny

every_method = pytest.mark.parametrize("name", names)
whitened = pytest.mark.parametrize("space", data.WHITENED)
PROVENANCE = Provenance("any", {}, 2, Key(0), "planted", "")
QUICK = Accuracy(
    replace(PROTOCOLS["wddl"], recipe=PROTOCOLS["wddl"].recipe.but(steps=3), nets=1),
    ConvNet(depth=1, width=4),
)


def made(name: str, splits: Splits) -> DistilledDataset:
    method = tiny(name, splits.train)
    problem = problem_of(method, splits.train)
    return method.finish(problem, go(method, problem)[0][-1])


@every_method
@whitened
def test_a_method_works_in_a_whitened_space_and_its_matrix_travels(
    name: str, space: str, tmp_path: Path
) -> None:
    plain = real()
    splits = data.in_space(plain, space)
    one = replace(made(name, splits), provenance=PROVENANCE)
    assert same_space(one.space, splits.space)
    one.save(tmp_path / "set")
    again = DistilledDataset.load(tmp_path / "set")
    assert again.fingerprint == one.fingerprint and same_space(again.space, splits.space)
    # The set's own matrix, as it was loaded, brings the real images to where they were when it was made.
    sets = Sets({name: (again,)})
    assert torch.equal(plain.to_space(again.space).test.images, splits.test.images)
    assert pipeline.beside(sets, plain).fingerprint == splits.fingerprint
    for wrong in (plain, plain.to_space(Pixel()), data.in_space(plain, _another(space))):
        with pytest.raises(UserError, match=f"in another space than this data; got sets in {space}, data in"):
            QUICK(sets, wrong, Runs(Plan()), key=Key(3))
    result = QUICK(sets, splits, Runs(Plan()), key=Key(3))
    assert bool(torch.isfinite(result.values[name]).all())


def _another(space: str) -> str:
    return "zca-frepo" if space != "zca-frepo" else "zca"


@pytest.mark.parametrize(
    ("space", "wrong"), [("zca-frepo", "pixel"), ("zca", "pixel"), ("standardised", "zca-frepo")]
)
def test_test_images_that_are_not_whitened_alike_are_the_known_disaster(
    digits: Splits, space: str, wrong: str
) -> None:
    """What the refusal is for: the same networks, shown test images of another space, lose a fifth and more."""
    splits = data.in_space(digits, space)
    one = pipeline.distill("random_subset", splits, ipc=10, seed=1, threads=1)
    net = ConvNet.defaults(splits.train)
    population = Runs(Plan()).get(on(one, net, PROTOCOLS["wddl"].recipe, networks(Key(3), 0, 2)))[0]

    def accuracy(shown: Dataset) -> float:
        return float(
            (population.logits(shown, population.final).argmax(-1) == shown.labels.hard()).double().mean()
        )

    right, mistaken = accuracy(splits.test), accuracy(data.in_space(digits, wrong).test)
    assert right > 0.8
    assert mistaken < right - 0.15
    with pytest.raises(UserError, match="in another space than this data"):
        Sets({"random_subset": (one,)}).check_against(data.in_space(digits, wrong))


def test_sets_of_several_spaces_are_not_asked_about_together(digits: Splits) -> None:
    sets = {
        space: pipeline.distill("random_subset", digits, space=space, threads=1)
        for space in ("standardised", "zca")
    }
    with pytest.raises(
        UserError,
        match="the set 'zca' is in another space than the others; got standardised and zca; ask about it on its own",
    ):
        pipeline.evaluate(sets, digits)
    fits = {n: data.in_space(replace_train(digits, n), "zca") for n in (300, 400)}
    sets = {str(n): pipeline.distill("random_subset", one, threads=1) for n, one in fits.items()}
    with pytest.raises(UserError, match="got two fits of zca; ask about it on its own"):
        pipeline.ask("behaviour/mixing", sets, digits)


def replace_train(splits: Splits, n: int) -> Splits:
    return replace(splits, train=splits.train.take(torch.arange(n)))


def test_real_data_of_any_space_is_brought_into_the_sets_own(digits: Splits) -> None:
    sets = Sets(
        {"random_subset": (pipeline.distill("random_subset", digits, space="zca", ipc=2, threads=1),)}
    )
    wanted = data.in_space(digits, "zca")
    for given in (digits, wanted, "digits"):
        assert pipeline.beside(sets, given).fingerprint == wanted.fingerprint
    near = pipeline.beside(sets, digits.to_space(Pixel()))
    torch.testing.assert_close(near.test.images, wanted.test.images, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="images cannot be brought out of the space zca-kip"):
        pipeline.beside(sets, data.in_space(digits, "zca-kip"))
    with pytest.raises(UserError, match="the distilled sets do not belong to this data"):
        pipeline.beside(sets, real())


@pytest.mark.parametrize("space", ["standardised", "zca-frepo"])
def test_a_study_says_its_space_and_is_locked_to_it(digits: Splits, space: str) -> None:
    plan = Plan()
    wanted = studies.design(data.in_space(digits, space), methods=["dm"], preset="smoke", plan=plan)
    assert (f"--space {space}" in wanted.command()) == (space != "standardised")
    assert wanted.request()["space"] == space
    other = studies.design(data.in_space(digits, "zca"), methods=["dm"], preset="smoke", plan=plan)
    assert wanted.request() != other.request()
