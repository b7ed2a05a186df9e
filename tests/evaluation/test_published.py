"""Every protocol on real digits in a tiny setting, from the sets to a result with its tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distillens import cli, pipeline
from distillens.analyses.behaviour.accuracy import Accuracy, AccuracyResult
from distillens.core.artefact import DistilledDataset
from distillens.core.contracts import Problem, Sets
from distillens.core.dataset import Dataset, Splits
from distillens.core.labels import Hard, Logits, Targets
from distillens.core.recipe import Recipe
from distillens.core.result import Estimate
from distillens.core.rng import Key
from distillens.distillers.random_subset import RandomSubset
from distillens.engine.plan import Plan
from distillens.evaluation.protocol import Protocol
from distillens.evaluation.published import PROTOCOLS, RAT_BPTT
from distillens.evaluation.trials import taught, trials
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs
from distillens.train import train

KEY = Key(23, ("published",))
NET = ConvNet(depth=2, width=8)


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs(Plan())


def subset(real: Splits, *place: str | int) -> DistilledDataset:
    problem = Problem(real.train, 1, KEY.fold(*place))
    method = RandomSubset()
    return method.finish(problem, method.start(problem))


def sets_of(real: Splits) -> Sets:
    """Hard labels, learned logits, learned targets and a learned step size, beside real images."""
    logits, targets = 6 * torch.eye(10), 2 * torch.eye(10) - 0.2
    own = {
        "hard": [subset(real, "hard", r) for r in range(2)],
        "soft": [replace(subset(real, "soft", r), labels=Logits(logits)) for r in range(2)],
        "targets": [replace(subset(real, "targets", r), labels=Targets(targets)) for r in range(2)],
        "rate": [replace(subset(real, "rate", r), recipe=Recipe(lr=0.02)) for r in range(2)],
    }
    return Sets(
        {name: tuple(many) for name, many in own.items()},
        {"random_subset": tuple(subset(real, "base", r) for r in range(2))},
        {"rate": tuple(subset(real, "start", r) for r in range(2))},
    )


def tiny(protocol: Protocol, budget: int = 10) -> Protocol:
    """The protocol with a budget of ten: what it does, in a second."""

    def shorter(numbers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({max(1, n * budget // protocol.budget) for n in numbers}))

    teaching = protocol.teaching
    if teaching is not None:
        views = min(teaching.views, 3)
        teaching = replace(teaching, recipe=teaching.recipe.but(lr=0.02), passes=2, views=views)
    return replace(
        protocol,
        recipe=protocol.recipe.but(steps=budget),
        passes=budget if protocol.passes else 0,
        moments=shorter(protocol.moments),
        steps_by_size=tuple(budget for _ in protocol.sizes),
        teaching=teaching,
        nets=2,
    )


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_judges_sets_of_all_kinds(
    name: str, digits: Splits, runs: Runs, tmp_path: Path
) -> None:
    protocol = tiny(PROTOCOLS[name])
    sets = taught(protocol, NET, sets_of(digits), digits, runs, KEY)
    analysis = Accuracy(protocol, NET)
    result = analysis(sets, digits, runs, key=KEY)
    assert all(value.shape == (2, 2) for value in result.values.values())
    assert (result.protocol, result.quirks) == (name, PROTOCOLS[name].quirks)
    assert AccuracyResult.load(result.save(tmp_path)).headline() == result.headline()
    assert all(quirk in result.notes() for quirk in protocol.quirks)
    table = result.tables()[0]
    assert table.columns[4:6] == ("bits stored", "images seen")
    by_name = {str(row[0]): row for row in table.rows}
    used = sets.distilled["hard"][0].storage()
    assert by_name["hard"][4] == used.bits
    assert ("teacher" in str(by_name["hard"][6])) == bool(used.teacher_bytes)
    steps = {t.steps for t in analysis.trainings(sets, digits, key=KEY) if len(t.data) == 10}
    if protocol.selection != "best_validation":
        assert by_name["hard"][5] == 10 * steps.pop()
    published = [t for t in result.tables() if t.title.startswith("As published")]
    assert bool(published) == (protocol.selection == "best_test")
    if published:
        (best,) = published
        for _, last, highest, optimism in best.rows:
            assert (
                isinstance(last, Estimate)
                and isinstance(highest, Estimate)
                and isinstance(optimism, Estimate)
            )
            assert optimism.value == pytest.approx(highest.value - last.value)
            assert optimism.value >= 0
        assert any("reports the best of" in note for note in result.notes())


def test_the_networks_that_protocols_name_train_on_digits(digits: Splits) -> None:
    """At full size, for a step."""
    nets = {name: one.net for name, one in PROTOCOLS.items() if one.net is not None}
    assert set(nets) == {"kip", "frepo", "sre2l", "rded"}
    for name in ("kip", "frepo", "rded"):
        net = nets[name]
        assert net is not None
        protocol = replace(tiny(PROTOCOLS[name], 1), rates=(), moments=(), selection="last", teaching=None)
        (training,) = trials(protocol, subset(digits, "one"), net, (KEY,))
        assert bool(torch.isfinite(train(training, Plan()).final).all())


# ---- the best look at the test split ----

BEST = replace(tiny(RAT_BPTT, 40), moments=(2, 5, 10, 20, 40))
LAST = replace(BEST, moments=(), selection="last")


def permuted(real: Splits) -> Splits:
    labels = real.test.labels.hard()[KEY.fold("permute").permutation(len(real.test))]
    test = Dataset(real.test.images, Hard(labels), real.test.classes, real.space)
    return Splits(real.train, real.val, test)


def test_nothing_but_the_extra_table_and_note_changes_with_the_selection(digits: Splits, runs: Runs) -> None:
    sets = sets_of(digits)
    best = Accuracy(BEST, NET, order=("hard", "soft"))(sets, digits, runs, key=KEY)
    last = Accuracy(LAST, NET, order=("hard", "soft"))(sets, digits, runs, key=KEY)
    assert best.headline() == last.headline()
    assert best.claims() == last.claims()
    assert best.tables()[:-1] == last.tables()
    assert best.chosen == last.chosen and best.seen == last.seen and best.bits == last.bits
    assert all(torch.equal(best.values[name], last.values[name]) for name in last.values)
    assert torch.equal(best.full, last.full)
    assert [note for note in best.notes() if note not in last.notes()] == [
        "The paper of rat_bptt reports the best of 5 looks at the test split: that stands in a table of its own. "
        "Accuracies, claims and figure are those after the last step."
    ]
    assert last.best == {} and set(best.best) == set(best.values)


@pytest.mark.parametrize(
    "protocol", [BEST, LAST, tiny(PROTOCOLS["neutral"])], ids=["test", "last", "validation"]
)
def test_permuting_the_test_labels_chooses_nothing(digits: Splits, runs: Runs, protocol: Protocol) -> None:
    """The networks that count are the same ones: their accuracies are those of the same predictions."""
    analysis = Accuracy(protocol, NET)
    sets, other = sets_of(digits), permuted(digits)
    honest, shuffled = (analysis(sets, real, runs, key=KEY) for real in (digits, other))
    assert honest.chosen == shuffled.chosen and honest.seen == shuffled.seen
    known = analysis.trainings(sets, digits, key=KEY)
    assert [t.fingerprint for t in known] == [t.fingerprint for t in analysis.trainings(sets, other, key=KEY)]
    for name, replicates in analysis._of_sets(sets, KEY).items():
        for r, each in enumerate(replicates):
            if protocol.selection == "best_validation":
                continue
            predicted = runs.get(*each)[-1].predictions(digits.test)
            for real, result in ((digits, honest), (other, shuffled)):
                right = (predicted == real.test.labels.hard()).double().mean(1)
                torch.testing.assert_close(result.values[name][r], right)


def test_the_optimism_is_found_where_there_is_nothing_but_luck(digits: Splits, runs: Runs) -> None:
    """With permuted test labels no look is better than another, and the best of five still gains."""
    result = Accuracy(BEST, NET)(sets_of(digits), permuted(digits), runs, key=KEY)
    assert all(result.optimism(name).value > 0 for name in ("hard", "soft", "rate"))
    shown = {str(row[0]): row[3] for row in result.tables()[-1].rows}
    assert shown["hard"] == result.optimism("hard")


def test_the_best_look_is_each_networks_own(digits: Splits, runs: Runs) -> None:
    sets = sets_of(digits)
    result = Accuracy(BEST, NET)(sets, digits, runs, key=KEY)
    training = Accuracy(BEST, NET)._of_sets(sets, KEY)["hard"][0][0]
    population = runs.get(training)[0]
    labels = digits.test.labels.hard()
    for j in range(2):
        looks = [
            float((population.logits(digits.test, population.at(m))[j].argmax(-1) == labels).double().mean())
            for m in (2, 5, 10, 20, 40)
        ]
        assert float(result.best["hard"][0, j]) == pytest.approx(max(looks))


# ---- the verb ----


def test_evaluate_takes_the_protocols_network_teacher_and_number(
    digits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(tiny(PROTOCOLS["sre2l"], 2), nets=3, net=ConvNet(1, 4))
    monkeypatch.setitem(PROTOCOLS, "sre2l", small)
    one = pipeline.distill("random_subset", digits, ipc=1, threads=1)
    result = pipeline.evaluate({"a": one}, digits, protocol="sre2l")
    assert isinstance(result, AccuracyResult)
    assert result.values["a"].shape == (1, 3)
    assert "teacher" in result.storage["a"] and "teacher" in result.storage["herding"]
    fewer = pipeline.evaluate({"a": one}, digits, protocol="sre2l", nets=1, net="mlp")
    assert isinstance(fewer, AccuracyResult)
    assert fewer.net == "MLP" and fewer.values["a"].shape == (1, 1)


def test_the_command_prints_cost_and_optimism_beside_accuracy(
    digits: Splits,
    runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = Accuracy(BEST, NET)(sets_of(digits), digits, runs, key=KEY)
    asked: dict[str, object] = {}

    def evaluate(*given: object, **wishes: object) -> AccuracyResult:
        asked.update(wishes)
        return result

    monkeypatch.setattr(pipeline, "evaluate", evaluate)
    monkeypatch.setattr(cli, "_load", lambda folders: ({}, {}, "digits"))
    words = ["evaluate", "runs/a", "--to", str(tmp_path), "--protocol", "rat_bptt", "--net", "mlp"]
    cli.app(words, standalone_mode=False)
    assert (asked["protocol"], asked["net"], asked["nets"]) == ("rat_bptt", "mlp", None)
    printed = capsys.readouterr().out
    assert "bits stored" in printed and "images seen" in printed
    assert f"{32 * (640 + 100):,}" in printed  # images and learned labels
    assert "As published: each network at the best of 5 looks at the test split" in printed
    assert result.optimism("hard").text() in printed
    assert all(quirk in printed for quirk in result.quirks)
    cli.app([*words, "--json"], standalone_mode=False)
    (saved,) = json.loads(capsys.readouterr().out)
    assert [table["title"] for table in saved["tables"]] == [table.title for table in result.tables()]


def test_the_docs_say_what_each_protocol_is_and_where_it_differs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    for protocol in PROTOCOLS.values():
        assert f"| `{protocol.name}` | {protocol.source} |" in page
        assert all(f"  - {quirk}\n" in page for quirk in protocol.quirks)
