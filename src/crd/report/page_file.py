"""The page: template, style and script of `page/` filled with a report's data, in one file without a network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from crd.atomic import replace_file
from crd.errors import CRDError
from crd.report import tables
from crd.report.figures import figure_data
from crd.report.pictures import Album, blank_album, grid_data, load_album, sheet_texts
from crd.report.read_run import Run, read_runs
from crd.report.words import count, duration, number, signed

LIMIT = 10_000_000  # bytes of a page
_SPARE = 2_000  # bytes for saying what was left out
_PAGE = files("crd.report") / "page"
_SCRIPTS = ("format.js", "axes.js", "charts.js", "plane.js", "pictures.js", "viewer.js", "page.js")


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one HTML file about one or several runs; it needs no network and no other file.

    The same runs give the same bytes. The file is replaced whole or not at all.

    Args:
        runs: run folders; parts that a run lacks are left out, and the page says so.
        out: the file to write; folders above it are made.

    Returns:
        `out`.

    Raises:
        CRDError: not a run folder, a malformed file in one (named, with its line), or `out` cannot be written.
    """
    page = render(read_runs(runs)).encode("utf-8")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, lambda path: path.write_bytes(page))
    except OSError as error:
        raise CRDError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    return out


def render(runs: Sequence[Run], limit: int = LIMIT) -> str:
    """The page as text.

    Args:
        runs: as read.
        limit: bytes; pictures are left out or made smaller where they do not fit.

    Raises:
        CRDError: a picture cannot be read, or they cannot be made to fit.
    """
    style = _asset("report.css")
    script = "(() => {\n'use strict';\n" + "\n".join(_asset(name) for name in _SCRIPTS) + "})();\n"
    figures = figure_data(runs)
    differing, usual = tables.settings(runs)
    # Undefined names are mistakes of the template; everything is escaped unless marked safe there.
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True)  # fmt: skip
    environment.filters |= {"number": number, "signed": signed, "duration": duration}
    environment.globals |= {"count": count, "event_word": tables.event_word, "kind_words": tables.KIND_WORDS}
    template = environment.from_string(_asset("template.html"), globals={
        "policy": _policy(style, script),
        "style": style,
        "script": script,
        "runs": runs,
        "summaries": [tables.run_summary(run) for run in runs],
        "numbers": [tables.numbers_table(run) for run in runs],
        "extremes": [tables.extremes(run) for run in runs],
        "drawn": figures["panels"],
        "sideways": figures["plane"],
        "differing": differing,
        "usual": usual,
        "environments": tables.environments(runs),
    })  # fmt: skip

    def fill(album: Album) -> str:
        grids = [grid_data(run, index, album) for index, run in enumerate(runs)]
        sheets = [sheet for index, run in enumerate(runs) for sheet in sheet_texts(run, index, album)]
        return template.render(album=album, grids=grids, sheets=sheets, data=_json({**figures, "grids": grids}))

    rest = len(fill(blank_album(runs)).encode("utf-8")) + _SPARE
    return fill(load_album(runs, limit - rest))


def _asset(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """A Content-Security-Policy that lets only this page's own style and script run, and loads nothing from afar."""
    return (
        f"default-src 'none'; img-src data: blob:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _json(data: Any) -> str:
    """JSON that may stand inside a script element: no text in it can close the element or open a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
