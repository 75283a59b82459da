"""Takes the pictures of docs/report.md from a run: `python docs/images/take.py RUN_DIR [RAW]`.

Needs Chromium. RAW: what the run wrote to a terminal, as `script --command ... RAW` records it; the
frame of the middle iteration becomes terminal.svg.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from megatron_sod.data.tokenizer import load_tokenizer  # noqa: E402
from megatron_sod.observe.report import write_report  # noqa: E402
from tests.helpers.browser import Page  # noqa: E402

HERE = Path(__file__).parent
MAX_BYTES = 200_000
WIDE, PHONE = (1280, 860), (390, 844)
# name: tab, scheme, size, a script to run before
PICTURES = {
    "report-light": ("overview", "light", WIDE, ""),
    "report-steps": ("steps", "light", WIDE, ""),
    "report-dark": ("trajectories", "dark", WIDE, "app.open(EXAMPLE)"),
    "report-whatif": ("whatif", "light", WIDE, ""),
    "report-phone": ("trajectories", "light", PHONE, "app.open(EXAMPLE)"),
}
# The last recovery whose text was kept, else the last trajectory with text.
EXAMPLE = """(() => { const r = app.run, p = r.meta.patterns.indexOf("recovery");
  const texts = [...Array(r.size).keys()].filter((i) => r.hasText(i));
  return texts.findLast((i) => r.pattern[i] === p) ?? texts.at(-1); })()"""


def main() -> None:
    run = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(_tokenizer_folder(run))
        html = write_report(run, tokenizer, out=Path(folder) / "report.html")
        page = Page(Path(folder) / "profile")
        for name, (tab, scheme, size, script) in PICTURES.items():
            page.resize(*size)
            page.prefer(scheme)
            page.open(html)
            page.until("!!globalThis.app")
            page.run(f"app.go('{tab}')")
            page.run(script.replace("EXAMPLE", EXAMPLE))
            time.sleep(0.6)  # charts draw when they know their width
            page.screenshot(HERE / f"{name}.webp")
        page.close()
    if len(sys.argv) > 2:
        terminal(Path(sys.argv[2]))
    for path in [*HERE.glob("*.webp"), *HERE.glob("*.svg")]:
        assert path.stat().st_size < MAX_BYTES, f"{path}: {path.stat().st_size} bytes"


def _tokenizer_folder(run: Path) -> Path:
    return run / "hf" if (run / "hf").is_dir() else ROOT / "configs/demo/student"


def terminal(raw: Path) -> None:
    """The panel of the middle iteration, with its colours."""
    frames = re.findall(r"(\x1b\[[0-9;]*m)?(╭─.*?╯)", raw.read_text(errors="replace"), re.DOTALL)
    texts = [Text.from_ansi((colour + body).replace("\r", "")) for colour, body in frames]
    whole = [text for text in texts if "memory" in text.plain and "train," in text.plain]
    frame = whole[len(whole) // 2]
    frame.plain = frame.plain.replace("\n\n", "\n")
    console = Console(record=True, width=max(map(len, frame.plain.split("\n"))), file=io.StringIO())
    console.print(frame)
    svg = console.export_svg(title="tools/train_sod.py")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # they name web addresses
    svg = svg.replace("Fira Code", "DejaVu Sans Mono")
    (HERE / "terminal.svg").write_text(svg)


if __name__ == "__main__":
    main()
