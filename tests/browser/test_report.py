from __future__ import annotations

import importlib.util
import json
import re
import shutil
import struct
import subprocess
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from distillens.report import write

CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium binary on the PATH"),
]

# The page is measured from outside, in a frame of the wanted width: a window cannot be made that narrow.
FRAME = """<!doctype html><body style="margin:0">
<iframe src="{page}" width="{width}" height="1200" style="border:0"></iframe><pre></pre>
<script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  const filters = page.querySelector("#filters");
  filters.elements.verdict.value = "supported";
  filters.elements.subject.value = "dm";
  filters.dispatchEvent(new Event("input"));
  const seen = (row) => row.offsetParent !== null && !row.classList.contains("dim");
  document.querySelector("pre").textContent = JSON.stringify({{
    width: page.documentElement.clientWidth,
    needed: page.documentElement.scrollWidth,
    broken: [...page.images].filter((i) => !i.naturalWidth).length,
    styled: getComputedStyle(page.querySelector(".pixels")).imageRendering,
    shown: [...page.querySelectorAll("tr[data-verdict]")].filter(seen).length,
    said: filters.querySelector("output").textContent,
  }});
}});
</script>"""


def builder() -> ModuleType:
    """The module that writes run folders for the report's own tests."""
    path = Path(__file__).parents[1] / "report" / "conftest.py"
    spec = importlib.util.spec_from_file_location("report_run_folder", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chromium(profile: Path, *arguments: str) -> tuple[str, list[str]]:
    """What headless Chromium prints, and what the page's console says."""
    assert CHROMIUM
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--allow-file-access-from-files", "--enable-logging=stderr", f"--user-data-dir={profile}"),
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A report page whose words and pictures are wider than a telephone."""
    tools = builder()
    run = tools.make_run(tmp_path / "digits")
    tools.write(run / "sets/ipc10/dm/0/preview.png", tools.png(3000, 40))
    path = run / "results/ipc10/behaviour.mixing.json"
    value = json.loads(path.read_text())
    wide = {"title": "Wide", "columns": ["column"] * 30, "rows": [["x" * 40] * 30]}
    tools.write(path, {**value, "tables": [wide], "notes": ["an_unbroken_word_" * 20]})
    study = json.loads((run / "study.json").read_text())
    study["data"] |= {"source": "parquet:" + "a_long_folder/" * 12, "fingerprint": "9f2c" * 16}
    tools.write(run / "study.json", {**study, "command": "distillens study " + "--set a=b " * 40})
    return write(run)


@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_fits_and_its_console_is_silent(page: Path, tmp_path: Path, width: int) -> None:
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=page.relative_to(tmp_path).as_posix(), width=width))
    dom, console = chromium(tmp_path / "profile", "--dump-dom", frame.as_uri())
    found = re.search(r"<pre>(\{.*?\})</pre>", dom)
    assert found, dom[-2000:]
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    assert console == []
    assert seen["needed"] <= seen["width"] <= width
    assert (seen["broken"], seen["styled"]) == (0, "pixelated")
    assert (seen["shown"], seen["said"]) == (4, "4 of 12 shown")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_photographed_in_both_schemes(page: Path, tmp_path: Path, scheme: str) -> None:
    picture = tmp_path / f"{scheme}.png"
    number = {"dark": 0, "light": 1}[scheme]
    settings = f"--blink-settings=preferredColorScheme={number}"
    size = ("--window-size=1280,2400", "--hide-scrollbars", f"--screenshot={picture}")
    _, console = chromium(tmp_path / "profile", settings, *size, page.as_uri())
    assert console == []
    from PIL import Image

    with Image.open(picture) as shown:
        assert shown.size == (1280, 2400)
        corner = shown.convert("L").getpixel((5, 5))
        assert isinstance(corner, int)
        assert (corner > 200) == (scheme == "light")
    assert struct.unpack(">II", picture.read_bytes()[16:24]) == (1280, 2400)
