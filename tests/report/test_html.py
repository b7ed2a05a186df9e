from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from distillens.report import summarise, to_html
from distillens.report.numerals import interval_text, value_text

VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """The tags and texts of a page; a tag that closes another one is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:], self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_every_claim_and_every_estimate_is_on_the_page(run: Path) -> None:
    summary = summarise(run)
    text = Page(to_html(summary)).text
    estimates = [finding.estimate for finding in summary.findings]
    for question in summary.questions:
        assert question.title in text and question.sentence in text
        for analysis in question.analyses:
            assert analysis.question in text
            for answer in analysis.answers:
                estimates += [e for _, e in answer.headline]
                assert all(note in text for note in answer.notes)
                assert all(figure.caption in text for figure in answer.figures)
                assert all(table.title in text for table in answer.tables)
    for subject in summary.subjects:
        for claim in subject.claims:
            assert all(words in text for words in (claim.statement, claim.null, claim.plant, claim.source))
    for estimate in estimates:
        assert f"{value_text(estimate)} {interval_text(estimate)}" in text
        assert f"n = {estimate.n} ({estimate.unit})" in text
    assert "0.457 [0.447, 0.467]" in text  # a table's cell
    assert "−0.046 no interval (n = 1)" in text


def test_verdicts_are_counted_and_marked_in_the_matrix(run: Path) -> None:
    page = Page(to_html(summarise(run)))
    assert "4 supported 4 not supported 4 inconclusive" in page.text
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    marks = [
        attrs for tag, attrs in page.tags if tag == "a" and (attrs.get("href") or "").startswith("#claim-")
    ]
    assert [m["title"] for m in marks].count("supported") == 4
    assert len(marks) == 12
    assert {(m["href"] or "")[1:] for m in marks} <= ids


def test_every_link_leads_to_a_place_on_the_page(run: Path) -> None:
    page = Page(to_html(summarise(run)))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        if tag in ("a", "use"):
            assert (attrs["href"] or "").removeprefix("#") in ids


def test_the_page_loads_nothing_and_embeds_every_picture(run: Path) -> None:
    html = to_html(summarise(run))
    page = Page(html)
    sources = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert len(sources) == 2 * (3 + 2) + 2 * 2  # a size: three sets, two starts; two figures
    for source in sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    for tag, attrs in page.tags:
        assert not {"srcset", "data", "action", "style"} & set(attrs), tag
        if tag == "link":
            assert attrs["href"] == "data:,"
        assert tag not in ("iframe", "object", "embed", "base")
    assert not re.search(r"https?:|url\(|@import", html)


def test_the_policy_names_our_style_and_our_script(run: Path) -> None:
    html = to_html(summarise(run))
    policy = next(attrs["content"] or "" for tag, attrs in Page(html).tags if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy


def test_words_from_the_folder_are_inert(run: Path) -> None:
    hostile = '<script>alert(1)</script><img src=x onerror="alert(2)">\'"'
    study = json.loads((run / "study.json").read_text())
    study |= {"title": hostile, "command": hostile, "preset": hostile, "plan": {hostile: hostile}}
    study["data"] |= {"source": hostile, "classes": [hostile], "fingerprint": hostile}
    study["versions"] = {hostile: hostile}
    for entry in study["sets"]:
        entry |= {"name": hostile, "paper": hostile, "family": hostile, "command": hostile}
        entry["storage"] = {hostile: 1}
    (run / "study.json").write_text(json.dumps(study))
    for path in run.glob("results/*/*.json"):
        value = json.loads(path.read_text())
        value |= {
            "title": hostile,
            "question": hostile,
            "notes": [hostile],
            "context": {"ipc": 1, "x": hostile},
        }
        value["analysis"] = f"{hostile}/{hostile}"
        value["headline"] = [{**e, "name": hostile, "unit": hostile} for e in value["headline"]]
        texts = dict.fromkeys(("name", "subject", "statement", "null", "plant", "source"), hostile)
        value["claims"] = [{**c, **texts} for c in value["claims"]]
        table = {"title": hostile, "columns": [hostile], "rows": [[hostile]]}
        value["tables"], value["figures"] = [table], [{"file": "x.png", "caption": hostile}]
        path.write_text(json.dumps(value))
    page = Page(to_html(summarise(run)))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count("<script>alert(1)</script>") > 40


@pytest.mark.parametrize("gone", ["study.json", "results", "sets", "results/ipc1/figures", "sets/ipc1/dm/0"])
def test_a_page_without_a_part_is_whole(run: Path, gone: str) -> None:
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(to_html(summarise(run)))
    assert "How to read a verdict" in page.text
    if gone == "results":
        assert "The claims" not in page.text
    if gone.endswith("figures"):
        assert "The figure figures/behaviour.mixing.png is not there." in page.text


def test_several_runs_are_told_apart(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "second")
    text = Page(to_html(summarise(run, tmp_path / "second"))).text
    assert "digits (2)" in text
    assert "24" in text


def test_names_have_the_colours_of_the_figures(run: Path) -> None:
    html = to_html(summarise(run))
    page = Page(html)
    swatches = {attrs.get("class") for _, attrs in page.tags if "swatch" in (attrs.get("class") or "")}
    assert swatches == {"swatch c-0072b2", "swatch c-cc79a7", "swatch c-7f7f7f"}
    assert ".c-0072b2 { --own: #0072B2; }" in html
    headline = [
        attrs["class"]
        for tag, attrs in page.tags
        if tag == "div" and (attrs.get("class") or "").startswith("c-")
    ]
    assert set(headline) == {"c-0072b2", "c-000000"}  # dm, full data
