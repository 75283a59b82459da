"""Commands, links and configuration keys of README.md and docs/, as a reader meets them.

A fenced bash block is run as written unless the line above it says otherwise:
    <!-- needs: gpu -->            also docker, cluster: parsed, not run
    <!-- takes: 40 min, run 2026-11-21 -->      run once by hand, dated
    <!-- example -->               placeholders in it: parsed, not run
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?[ ]*```bash\n(?P<body>.*?)```", re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_MARK = re.compile(r"needs: (gpu|docker|cluster)|takes: \d+ min, run \d{4}-\d{2}-\d{2}|example")


@dataclass(frozen=True)
class Block:
    """One fenced bash block."""

    page: str  # "docs/report.md"
    mark: str  # "" when it is to be run
    body: str

    @property
    def commands(self) -> list[str]:
        """Its commands, continued lines joined, comments left out."""
        joined = self.body.replace("\\\n", " ")
        lines = (line.split(" #")[0].strip() for line in joined.splitlines())
        return [" ".join(line.split()) for line in lines if line and not line.startswith("#")]


def pages() -> list[Path]:
    """Every page a user is meant to read."""
    top = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.is_file()]
    return [*top, *sorted((ROOT / "docs").rglob("*.md")), ROOT / "kernels" / "README.md"]


def blocks() -> list[Block]:
    """Every bash block of every page."""
    found = []
    for page in pages():
        name = str(page.relative_to(ROOT))
        found += [
            Block(name, m["mark"] or "", textwrap.dedent(m["body"]))
            for m in _BLOCK.finditer(page.read_text())
        ]
    return found


def is_known(mark: str) -> bool:
    return not mark or _MARK.fullmatch(mark) is not None


def links(page: Path) -> list[str]:
    """Targets of relative links."""
    return [
        target
        for target in _LINK.findall(page.read_text())
        if not target.startswith(("http://", "https://", "mailto:"))
    ]


def anchors(page: Path) -> set[str]:
    """Heading anchors as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[`*]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}
