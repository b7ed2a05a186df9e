from __future__ import annotations

import json
from pathlib import Path

from distillens.report import summarise, to_markdown


def test_claims_come_first_with_their_estimates(run: Path) -> None:
    text = to_markdown(summarise(run))
    assert "12 tested claims: 4 supported, 4 not supported, 4 inconclusive." in text
    assert text.index("## Claims") < text.index("## Behaviour") < text.index("## Provenance")
    assert (
        "| Real images added to dm lower accuracy. | ipc 10 | −0.087 [−0.098, −0.076] "
        "| n = 5 (replicate) | below −0.02 | **supported** |"
    ) in text
    assert "−0.046 no interval (n = 1)" in text
    assert "| dm | 20 | 0.457 [0.447, 0.467], n = 5 (replicate) |" in text
    assert "- command: distillens study --data digits --to runs/digits" in text


def test_words_from_the_folder_are_no_markup(run: Path) -> None:
    path = run / "results/ipc1/behaviour.mixing.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "notes": ["<b>a|b</b>\n# [x](y) *z*"]}))
    assert r"> \<b\>a\|b\</b\> \# \[x\](y) \*z\*" in to_markdown(summarise(run))
