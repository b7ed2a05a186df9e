"""The main job as a user runs it: whole, killed, resumed, repeated."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distillens import making, studies
from distillens.core.checks import UserError
from distillens.core.dataset import Splits
from distillens.core.rng import Key
from distillens.runs import Runs
from tests.end_to_end.folders import gone, settled


def test_a_study_ends_in_a_report_of_all_its_questions(small_study: Path) -> None:
    page = (small_study / "report.html").read_text()
    saved = sorted(path.stem for path in (small_study / "results" / "ipc1").glob("*.json"))
    assert saved == [
        "behaviour.accuracy",
        "behaviour.mixing",
        "behaviour.recognition",
        "pointwise.leave_one_out",
        "representativeness.early_agreement",
    ]
    claims = [
        c
        for path in (small_study / "results").rglob("*.json")
        for c in json.loads(path.read_text())["claims"]
    ]
    assert len({(c["subject"], c["name"]) for c in claims}) == len(claims)
    for claim in claims:
        assert claim["verdict"] in ("supported", "not supported", "inconclusive")
        assert claim["null"] and claim["plant"]
        assert claim["statement"] in page.replace("&#39;", "'")
    said = json.loads((small_study / "study.json").read_text())
    assert {one["name"] for one in said["sets"]} == {"dm", "mtt", "random_subset", "herding"}
    assert all(one["storage"]["floats"] == 640 for one in said["sets"])


def test_every_set_of_a_study_is_made_again_by_its_own_command(small_study: Path, tmp_path: Path) -> None:
    about = json.loads((small_study / "study.json").read_text())
    one = next(s for s in about["sets"] if s["name"] == "mtt" and s["replicate"] == 1)
    words = one["command"].split()
    subprocess.run(
        [sys.executable, "-m", "distillens.cli", *words[1:], "--to", str(tmp_path / "again")], check=True
    )
    for name in ("data.safetensors", "provenance.json", "log.json", "initial/data.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (small_study / one["folder"] / name).read_bytes()


def test_a_finished_study_does_nothing_and_says_so(distillens, small_study: Path, small: list[str]) -> None:
    before = settled(small_study)
    again = distillens("study", "--to", small_study, *small)
    assert again.returncode == 0
    assert "nothing to do" in again.stderr
    assert settled(small_study) == before


def test_one_worker_ends_in_the_bytes_of_two(
    distillens, small_study: Path, small: list[str], tmp_path: Path
) -> None:
    alone = [*small]
    alone[alone.index("--workers") + 1] = "1"
    done = distillens("study", "--to", tmp_path / "alone", *alone)
    assert done.returncode == 0, done.stderr
    assert settled(tmp_path / "alone") == settled(small_study)


def test_the_time_of_a_study_is_put_down_to_what_it_went_to(small_study: Path) -> None:
    took = json.loads((small_study / "timing.json").read_text())
    asked = json.loads((small_study / "study.json").read_text())["asked"]
    assert set(took["by"]) == {"sets", "models for all questions", "answers"}
    assert 0.5 * took["seconds"] < sum(took["by"].values()) <= took["seconds"]
    assert set(took["answers"]) == set(asked) and min(took["answers"].values()) > 0


def test_a_folder_of_other_settings_is_refused(distillens, small_study: Path, small: list[str]) -> None:
    other = distillens("study", "--to", small_study, *small, "--seed", "1")
    assert other.returncode == 2
    assert "was made with other settings" in other.stderr
    assert "--force" in other.stderr


@pytest.mark.parametrize("fractions", [(0.25, 0.45), (0.6, 0.8)])
def test_a_study_that_is_killed_ends_in_the_same_bytes(
    distillens, small_study: Path, small: list[str], tmp_path: Path, fractions: tuple[float, ...]
) -> None:
    whole = json.loads((small_study / "timing.json").read_text())["seconds"]
    to = tmp_path / "killed"
    command = [sys.executable, "-m", "distillens.cli", "study", "--to", str(to), *small]
    for fraction in fractions:
        running = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(3 + fraction * whole)  # about 3 s pass before the study begins
        running.kill()  # the command alone: its workers must end by themselves
        running.wait()
        assert gone(running.pid), "workers outlived their command"
    done = distillens("study", "--to", to, *small)
    assert done.returncode == 0, done.stderr
    resumed, expected = settled(to), settled(small_study)
    assert sorted(resumed) == sorted(expected)
    assert [name for name in expected if resumed[name] != expected[name]] == []


def test_no_model_of_a_study_is_trained_twice(
    digits: Splits, tmp_path: Path, small: list[str], monkeypatch
) -> None:
    stores: list[Runs] = []
    original = Runs.__init__

    def remember(self: Runs, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        stores.append(self)

    monkeypatch.setattr(Runs, "__init__", remember)
    settings = tuple(value for flag, value in zip(small[::2], small[1::2], strict=True) if flag == "--set")
    wishes = {"methods": ("dm", "mtt"), "preset": "smoke", "settings": settings}
    planned = studies.forecast(studies.design(digits, **wishes), 1)
    studies.study(digits, tmp_path / "study", workers=1, **wishes)
    store, *readers = stores
    assert readers and not any(reader.trained for reader in readers)  # an answer finds all that it asks for
    assert set(store.trained.values()) == {1}
    assert sum(store.trained.values()) == planned.models
    assert json.loads((tmp_path / "study" / "study.json").read_text())["trainings"] == planned.models


def test_a_forecast_counts_exactly_what_the_quick_preset_trains(digits: Splits) -> None:
    study = studies.design(digits)
    cost = studies.forecast(study, 2)
    assert cost.sets == len(study.orders) == 2 * 6 * 5
    # Leave-one-out: five sets at 1 image a class, one at 10; three initialisations.
    leave_one_out = 3 * (5 * 11 + 101)
    assert cost.models > leave_one_out
    assert "models to train: about" in cost.text()


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"methods": ("dmm",)}, "unknown method 'dmm'.*Did you mean 'dm'"),
        ({"methods": ("dm", "dm")}, "named twice"),
        ({"methods": ("random_subset",)}, "is in every study as a baseline"),
        ({"preset": "quik"}, "unknown preset 'quik'.*Did you mean 'quick'"),
        ({"protocol": "wdl"}, "unknown protocol 'wdl'.*Did you mean 'wddl'"),
        ({"settings": ("dm.stesp=3",)}, "unknown setting of dm 'stesp'.*Did you mean 'steps'"),
        ({"settings": ("dx.steps=3",)}, "unknown owner of a setting 'dx'"),
        ({"ipc": (500,)}, r"class '\d' has \d+ images, 500 were asked for"),
    ],
)
def test_a_study_is_checked_in_full_before_it_begins(
    digits: Splits, tmp_path: Path, wish, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        studies.study(digits, tmp_path / "s", **wish)
    assert not (tmp_path / "s").exists()


def test_the_orders_of_a_study_have_their_own_keys(digits: Splits) -> None:
    keys = [order.key for order in studies.design(digits).orders]
    assert len(set(keys)) == len(keys)
    assert making.order("dm", digits, 10, seed=0, replicate=3).key in keys
    assert all(key.seed == 0 for key in keys)
    assert Key(0, ("distil", "dm", 10, 3)) in keys


def test_the_command_of_a_set_keeps_the_studys_threads(monkeypatch, tmp_path: Path) -> None:
    from distillens import tuning
    from distillens.data.planted import planted
    from distillens.engine import plan
    from distillens.kernels import compiled
    from distillens.studies import asked
    from distillens.studies.about import about

    monkeypatch.setattr(plan, "cores", lambda: 4)
    monkeypatch.setattr(asked, "cores", lambda: 4)
    # As on a machine where four threads are four times as fast as one.
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path)
    monkeypatch.setattr(tuning, "_seconds", lambda asked, plan, batch, models: models / plan.threads)
    tuning._measured.cache_clear()
    real = planted(Key(1), shape=(1, 20, 20), per_class=12)
    study = studies.design(real, methods=("dm",), ipc=(1,), preset="smoke", replicates=1)
    said = about(study, studies.Forecast(0, 0, 0.0), {})
    assert study.plan.threads == 1
    assert plan.Plan.resolve(real.train).threads == 4
    assert all(one["command"].endswith("--precision float32 --threads 1") for one in said["sets"])
    tuning._measured.cache_clear()


def test_the_docs_can_be_written_from_a_study(
    small_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The committed figures are of older studies: this one is what their next run leaves."""
    from benchmarks.study import collect
    from docs import render

    (tmp_path / "small.json").write_text(json.dumps(collect(small_study)))
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    table = render.accuracy_table("small")
    assert table.count("| dm | 1 |") == 1 and "n = 2 replicates" in table
    claims = render.claims_table("small")
    assert "| real data hurts | dm | 1 |" in claims
    assert claims.count("\n") > 10
