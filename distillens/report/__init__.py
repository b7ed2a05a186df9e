"""Reports: saved results in, one page out. Nothing here trains, computes or draws."""

from __future__ import annotations

from pathlib import Path

from distillens.core.checks import UserError
from distillens.core.storage import write_bytes
from distillens.report.as_json import to_json
from distillens.report.html import to_html
from distillens.report.markdown import to_markdown
from distillens.report.summary import Summary, summarise

__all__ = ["Summary", "summarise", "to_html", "to_json", "to_markdown", "write"]

_WRITERS = {".html": to_html, ".md": to_markdown}


def write(folder: Path, *others: Path, to: Path | None = None) -> Path:
    """The report of one run folder or several, written to ``to`` with its JSON beside; ``to`` is returned.

    ``to`` ends in ``.html`` or ``.md`` and is ``report.html`` in the first folder where it is not given.
    The same folders give the same bytes.

    Raises:
        UserError: a folder is not there, holds nothing to report, or a file in it is damaged; ``to`` has
            another ending or cannot be written.
    """
    to = folder / "report.html" if to is None else to
    if to.suffix not in _WRITERS:
        raise UserError(
            "a report is a page or Markdown", got=f"{to}", expected="a name that ends in .html or .md"
        )
    summary = summarise(folder, *others)
    text = _WRITERS[to.suffix](summary)
    write_bytes(to.with_suffix(".json"), to_json(summary).encode())
    write_bytes(to, text.encode())
    return to
