"""Every verb as a user types it, and every mistake: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from distillens.core.recipe import Recipe
from distillens.core.rng import Key
from distillens.engine.plan import Plan
from distillens.experts import Experts
from distillens.nets.convnet import ConvNet
from distillens.runs import Runs

FAST = ["--set", "steps=4", "--set", "net.width=8"]


@pytest.fixture(scope="module")
def dm(distillens, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("sets") / "dm-1"
    done = distillens("distill", "dm", "--to", to, *FAST)
    assert done.returncode == 0, done.stderr
    return to


def test_distill_writes_open_formats_only(dm: Path) -> None:
    names = {path.relative_to(dm).as_posix() for path in dm.rglob("*") if path.is_file()}
    assert names == {
        "data.safetensors",
        "provenance.json",
        "preview.png",
        "log.json",
        "request.json",
        "initial/data.safetensors",
        "initial/provenance.json",
        "initial/preview.png",
    }
    assert not (dm.parent / ".dm-1.store").exists()
    log = json.loads((dm / "log.json").read_text())
    assert len(log["loss"]) == 4


def test_distill_again_says_that_it_is_done_and_force_redoes(distillens, dm: Path) -> None:
    before = (dm / "data.safetensors").read_bytes()
    again = distillens("distill", "dm", "--to", dm, *FAST)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    forced = distillens("distill", "dm", "--to", dm, *FAST, "--force", "--json")
    assert forced.returncode == 0
    assert set(json.loads(forced.stdout)) == {"folder", "fingerprint", "points"}
    assert (dm / "data.safetensors").read_bytes() == before


def test_another_seed_or_replicate_is_another_set(distillens, dm: Path, tmp_path: Path) -> None:
    for extra in (["--seed", "1"], ["--replicate", "1"]):
        to = tmp_path / extra[0].strip("-")
        assert distillens("distill", "dm", "--to", to, *FAST, *extra).returncode == 0
        assert (to / "data.safetensors").read_bytes() != (dm / "data.safetensors").read_bytes()


def test_evaluate_ask_and_report_go_on_from_a_set(distillens, dm: Path, tmp_path: Path) -> None:
    evaluated = distillens("evaluate", dm, "--nets", "2", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    (accuracy,) = json.loads(evaluated.stdout)
    assert {one["name"] for one in accuracy["headline"]} == {"dm", "random_subset", "herding", "full data"}
    assert {one["name"] for one in accuracy["claims"]} == {"beats random", "beats its start"}
    asked = distillens("ask", "pointwise/leave_one_out", dm, "--set", "recipe.steps=10", "--set", "inits=2")
    assert asked.returncode == 0, asked.stderr
    assert "Leave-one-out influence" in asked.stdout
    reported = distillens("report", dm, "--to", tmp_path / "page.html")
    assert reported.returncode == 0, reported.stderr
    page = (tmp_path / "page.html").read_text()
    assert "Leave-one-out influence" in page and "Accuracy after training" in page


def test_a_set_of_another_space_is_made_and_judged_in_it(distillens, dm: Path, tmp_path: Path) -> None:
    to = tmp_path / "white"
    order = ["distill", "dm", "--data", "digits", "--ipc", "1", "--to", to, *FAST]
    done = distillens(*order, "--space", "zca")
    assert done.returncode == 0, done.stderr
    refused = distillens(*order)
    assert refused.returncode == 2
    assert "was made with other settings" in refused.stderr
    assert "space 'zca' there, 'standardised' asked for" in refused.stderr
    evaluated = distillens("evaluate", to, "--nets", "1", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    (accuracy,) = json.loads(evaluated.stdout)
    assert next(one for one in accuracy["headline"] if one["name"] == "full data")["value"] > 0.9
    mixed = distillens("evaluate", to, dm, "--nets", "1")
    assert mixed.returncode == 2
    assert "the set 'dm' is in another space than the others; got zca and standardised" in mixed.stderr


@pytest.mark.parametrize("what", ["distillers", "analyses", "nets", "data", "protocols"])
def test_list_names_what_there_is(distillens, what: str) -> None:
    rows = json.loads(distillens("list", what, "--json").stdout)
    assert rows and all(row["name"] for row in rows)
    plain = distillens("list", what).stdout.splitlines()
    assert [line.split()[0] for line in plain] == [row["name"] for row in rows]


def mistakes(tmp_path: Path, dm: Path) -> dict[str, tuple[list[str | Path], str]]:
    file, full = tmp_path / "file", tmp_path / "full"
    file.write_text("here")
    full.mkdir()
    (full / "thesis.txt").write_text("keep me")
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("provenance.json", "preview.png"):
        (broken / name).write_bytes((dm / name).read_bytes())
    (broken / "data.safetensors").write_bytes((dm / "data.safetensors").read_bytes()[:100])
    to = tmp_path / "new"
    return {
        "unknown method": (["distill", "dmm", "--to", to], "unknown method 'dmm'; Did you mean 'dm'?"),
        "unknown setting": (
            ["distill", "dm", "--to", to, "--set", "stepz=3"],
            "unknown setting of dm 'stepz'; Did you mean 'steps'?",
        ),
        "setting of another type": (
            ["distill", "dm", "--to", to, "--set", "steps=many"],
            "setting 'steps' does not fit; got 'many'",
        ),
        "setting out of range": (
            ["distill", "dm", "--to", to, "--set", "lr_img=-1"],
            "dm: lr_img must be above 0",
        ),
        "missing path": (["distill", "dm", "--to", to, "--data", "parquet:nowhere"], "nowhere"),
        "unknown data": (
            ["distill", "dm", "--to", to, "--data", "digitz"],
            "unknown data 'digitz'; Did you mean 'digits'?",
        ),
        "unknown space": (
            ["distill", "dm", "--to", to, "--space", "zcakip"],
            "unknown space 'zcakip'; Did you mean 'zca-kip'?",
        ),
        "class with too few images": (
            ["distill", "dm", "--to", to, "--ipc", "400"],
            "images, 400 were asked for; ask for at most",
        ),
        "no such device": (
            ["distill", "dm", "--to", to, "--device", "cuda:7"],
            "there is no device 'cuda:7' here",
        ),
        "folder of other settings": (
            ["distill", "dm", "--to", dm, "--seed", "5", *FAST],
            "was made with other settings",
        ),
        "folder of somebody else": (
            ["distill", "dm", "--to", full],
            "holds files that are not a run of distillens",
        ),
        "file for a folder": (["distill", "dm", "--to", file], "is a file; expected a folder to write to"),
        "no set there": (["evaluate", full], "there is no distilled set in"),
        "corrupt set": (["evaluate", broken], "is not a whole safetensors file"),
        "unknown analysis": (
            ["ask", "behavior", dm],
            "unknown analysis or question 'behavior'; Did you mean 'behaviour'?",
        ),
        "unknown protocol": (
            ["evaluate", dm, "--protocol", "wdl"],
            "unknown protocol 'wdl'; Did you mean 'wddl'?",
        ),
        "unknown list": (["list", "distiller"], "unknown list 'distiller'; Did you mean 'distillers'?"),
        "nothing to report": (["report", full], str(full)),
        "sizes that are not": (
            ["study", "--to", to, "--ipc", "one"],
            "--ipc takes whole numbers from 1; got 'one'",
        ),
    }


NAMES = [
    "unknown method", "unknown setting", "setting of another type", "setting out of range", "missing path",
    "unknown data", "unknown space", "class with too few images", "no such device", "folder of other settings",
    "folder of somebody else", "file for a folder", "no set there", "corrupt set", "unknown analysis",
    "unknown protocol", "unknown list", "nothing to report", "sizes that are not",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_one_clear_line_and_exit_code_2(distillens, dm: Path, tmp_path: Path, name: str) -> None:
    cases = mistakes(tmp_path, dm)
    assert sorted(cases) == sorted(NAMES)
    arguments, message = cases[name]
    failed = distillens(*arguments)
    assert failed.returncode == 2, failed.stderr
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert failed.stderr.count("\n") == 1, failed.stderr
    assert (tmp_path / "full" / "thesis.txt").read_text() == "keep me"
    assert not (tmp_path / "new" / "provenance.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_a_clear_error_and_keeps_what_was_there(tmp_path: Path, monkeypatch) -> None:
    from distillens.core import storage
    from distillens.core.checks import UserError

    target = tmp_path / "result.json"
    storage.write_json(target, {"before": 1})
    real_fsync = os.fsync

    def full(descriptor: int) -> None:
        with open("/dev/full", "wb", buffering=0) as device:  # noqa: PTH123
            device.write(b"x")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full: free some space"):
        storage.write_json(target, {"after": 2})
    assert json.loads(target.read_text()) == {"before": 1}
    assert list(tmp_path.iterdir()) == [target]


def test_help_and_version_import_no_torch(distillens) -> None:
    import subprocess
    import sys

    code = (
        "import sys, distillens.cli as c; sys.argv = ['distillens', '--help']\n"
        "try: c.main()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "study" in done.stdout
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", distillens("--version").stdout)


# ---- experts ----

QUICK = [
    "--set", "steps=3", "--set", "net.width=4", "--set", "syn_steps=3", "--set", "experts=2",
    "--set", "max_start_epoch=2", "--set", "expert_epochs=1",
]  # fmt: skip


def test_experts_that_are_kept_serve_the_next_method(distillens, tmp_path: Path) -> None:
    store = ["--store", tmp_path / "store"]
    first = distillens("distill", "mtt", "--to", tmp_path / "mtt", *QUICK, *store)
    assert first.returncode == 0, first.stderr
    assert "2 models to train first, about " in first.stderr
    assert "training what the methods start from: 2 of 2" in first.stderr
    made = sorted((tmp_path / "store" / "experts").iterdir())
    second = distillens("distill", "tesla", "--ipc", "2", "--to", tmp_path / "tesla", *QUICK, *store)
    assert second.returncode == 0, second.stderr
    assert "training what the methods start from" not in second.stderr
    assert sorted((tmp_path / "store" / "experts").iterdir()) == made
    inputs = [json.loads((tmp_path / n / "provenance.json").read_text())["inputs"] for n in ("mtt", "tesla")]
    assert inputs[0] == inputs[1] and list(inputs[0]) == ["experts"]


def test_imported_experts_are_followed(distillens, digits, tmp_path: Path) -> None:
    net = ConvNet(depth=2, width=4)
    experts = Experts(digits.train, net, Recipe(batch=256, momentum=0.0), Key(3).split(2), 2)
    found = Runs(Plan()).trajectories(experts)
    theirs = [[list(found.shapes.unflatten(found.at(e, t)).values()) for t in range(3)] for e in range(2)]
    torch.save(
        [[[p.clone() for p in snapshot] for snapshot in one] for one in theirs],
        tmp_path / "replay_buffer_0.pt",
    )
    brought = distillens(
        "import", tmp_path / "replay_buffer_0.pt", "--from", "mtt_buffer", "--data", "digits",
        "--set", "width=4", "--to", tmp_path / "experts",
    )  # fmt: skip
    assert brought.returncode == 0, brought.stderr
    assert brought.stdout.startswith("2 experts of 2 passes in ")
    followed = distillens("distill", "mtt", "--experts", tmp_path / "experts", "--to", tmp_path / "m", *QUICK)
    assert followed.returncode == 0, followed.stderr
    assert "models to train first" not in followed.stderr
    inputs = json.loads((tmp_path / "m" / "provenance.json").read_text())["inputs"]
    listed = json.loads((tmp_path / "experts" / "experts.json").read_text())
    assert inputs == {"experts": listed["fingerprint"]}
    refused = distillens("distill", "dm", "--experts", tmp_path / "experts", "--to", tmp_path / "d")
    assert (refused.returncode, refused.stderr.strip()) == (
        2, "distillens: dm follows no experts; leave --experts out",
    )  # fmt: skip
    longer = [*QUICK, "--set", "max_start_epoch=4"]
    short = distillens("distill", "mtt", "--experts", tmp_path / "experts", "--to", tmp_path / "s", *longer)
    assert short.returncode == 2
    assert "mtt: the experts end too early; got 2 passes; expected at least" in short.stderr
    unknown = distillens("import", tmp_path, "--from", "mtt_bufer", "--to", tmp_path / "x")
    assert unknown.returncode == 2 and "Did you mean 'mtt_buffer'?" in unknown.stderr


def test_formats_are_listed(distillens) -> None:
    done = distillens("list", "formats", "--json")
    assert [row["name"] for row in json.loads(done.stdout)] == ["dc", "mtt_buffer", "wddl"]


def test_a_diverging_distillation_is_one_line_and_keeps_a_set(distillens, tmp_path: Path) -> None:
    settings = ["--set", "steps=20", "--set", "net.width=4", "--set", "net.norm=none", "--set", "lr_img=1e9"]
    done = distillens("distill", "dm", "--to", tmp_path / "run", *settings)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("distillens: the distillation diverged: ")
    assert str(tmp_path / "run" / "last_good") in done.stderr
    assert distillens("evaluate", tmp_path / "run" / "last_good", "--nets", "1").returncode == 0
