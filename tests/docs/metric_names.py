"""The names the tables of docs/metrics.md explain, as patterns."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT

_HOLES = {"K": r"\d+", "SOURCE": r".+", "n": r"\d+", "k": r"\d+", "*": r".+"}


def documented() -> list[re.Pattern]:
    """One pattern per name; `/max` after `a/b/mean` is `a/b/max`, and K, SOURCE, n, k stand for
    what they say."""
    found, last = [], ""
    lines = (ROOT / "docs/metrics.md").read_text().splitlines()
    rows = "\n".join(line for line in lines if line.startswith("|"))
    for name in re.findall(r"`([A-Za-z0-9_/@*.-]+)`", rows):
        if name.startswith("/"):
            name = last.rsplit("/", name.count("/"))[0] + name
        last = name
        parts = re.split(r"\b(K|SOURCE)\b|(?<=_)(K)$|(?<=@)([nk])\b|(\*)", name)
        pattern = "".join(_HOLES.get(p, re.escape(p)) for p in parts if p)
        found.append(re.compile(pattern))
    return found


def undocumented(names) -> set[str]:
    patterns = documented()
    return {name for name in names if not any(p.fullmatch(name) for p in patterns)}
