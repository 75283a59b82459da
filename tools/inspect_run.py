"""A run as one HTML page: curves, step weights, every trajectory, what-if, comparison of two runs.

python tools/inspect_run.py RUN_DIR [--compare RUN_DIR2] [--out FILE]
"""

import argparse
from pathlib import Path

import yaml

from megatron_sod.command_line import user_errors
from megatron_sod.data.tokenizer import load_tokenizer
from megatron_sod.observe.report import write_report
from megatron_sod.observe.report.run_data import MAX_TEXT_TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder that a training run wrote")
    parser.add_argument("--compare", metavar="RUN_DIR2", help="a second run, shown as B")
    parser.add_argument("--out", help="file to write; default: RUN_DIR/report.html")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="default: RUN_DIR/hf, else the run's student.path"
    )
    parser.add_argument(
        "--max-text-tokens",
        type=int,
        default=MAX_TEXT_TOKENS,
        help=f"texts beyond this many tokens are left out; default {MAX_TEXT_TOKENS}",
    )
    arguments = parser.parse_args()
    with user_errors():
        path = write_report(
            arguments.run_dir,
            _tokenizer(Path(arguments.run_dir), arguments.tokenizer),
            compare=arguments.compare,
            out=arguments.out,
            max_text_tokens=arguments.max_text_tokens,
        )
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


def _tokenizer(run_dir: Path, given: str | None):
    """The student's tokenizer; None, with a line about it, when the run's own is nowhere."""
    if given is not None:
        return load_tokenizer(given)
    stored = run_dir / "config.yaml"
    config = yaml.safe_load(stored.read_text()) if stored.is_file() else {}
    for folder in (run_dir / "hf", Path(config.get("student", {}).get("path", "none"))):
        if (folder / "tokenizer_config.json").is_file():
            return load_tokenizer(str(folder))
    print("no tokenizer found: the page shows token ids; give --tokenizer DIR for text")
    return None


if __name__ == "__main__":
    main()
