"""Puts the page together: template, styles, scripts and one or two runs' data in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from megatron_sod.observe.report.payload import pack
from megatron_sod.observe.report.run_data import MAX_TEXT_TOKENS, read_run

HERE = Path(__file__).parent
SCRIPTS = (
    "data",
    "weights",
    "dom",
    "charts",
    "areas",
    "curves",
    "steps",
    "trajectories",
    "detail",
    "whatif",
    "overview",
    "main",
)


def write_report(
    run_dir: str | Path,
    tokenizer: Any,
    *,
    compare: str | Path | None = None,
    out: str | Path | None = None,
    max_text_tokens: int = MAX_TEXT_TOKENS,
) -> Path:
    """Draw the run in `run_dir`, beside `compare` when given. Returns the path of the page.

    Args:
        tokenizer: of the student; None shows token ids.
        out: default `run_dir`/report.html.
    Raises:
        DataError: a folder holds no run.
    """
    path = Path(out) if out is not None else Path(run_dir) / "report.html"
    runs = [Path(run_dir)] + ([Path(compare)] if compare is not None else [])
    payloads = [pack(*read_run(run, tokenizer, max_text_tokens=max_text_tokens)) for run in runs]
    page = jinja2.Environment(autoescape=True).from_string(_read("page.html.jinja"))
    text = page.render(
        name=runs[0].name,
        payloads=payloads,
        style=_read("page.css"),
        script="\n".join(_read(f"{name}.js") for name in SCRIPTS),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
