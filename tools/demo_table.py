"""The demo's world as tables of results.

python tools/demo_table.py [--only sod-0,grpo]           docs/demo_results.md: seeds and controls
python tools/demo_table.py --table methods [--only opd]  docs/methods_results.md: all, one seed
python tools/demo_table.py --table methods --write-only [--runs DIR]  the page, from runs there are
"""

import argparse
import sys
from pathlib import Path

from megatron_sod.config.load import load_config
from megatron_sod.eval.demo import TABLES, run_demo
from megatron_sod.eval.demo_table import table_page

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=TABLES, default="demo")
    parser.add_argument("--only", help="comma-separated subset of the table's runs")
    parser.add_argument("--write-only", action="store_true", help="run nothing; write the page")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs", help="where --write-only finds them"
    )
    parser.add_argument("overrides", nargs="*", help="dotted key=value for every run")
    arguments = parser.parse_args()
    table = TABLES[arguments.table]
    names = arguments.only.split(",") if arguments.only else list(table.runs)
    if unknown := [name for name in names if name not in table.runs]:
        parser.error(f"no run {', '.join(unknown)} in this table; it has {', '.join(table.runs)}")
    failed = []
    for name in [] if arguments.write_only else names:
        overrides = [*table.runs[name][1], *arguments.overrides]
        if run_demo(ROOT, table.run_name(name), overrides):
            failed.append(name)
    text = table_page(table, arguments.runs, load_config(ROOT / "configs/demo_cpu.yaml"))
    (ROOT / table.page).write_text(text)
    print(text)
    if failed:
        sys.exit(f"did not run to the end: {', '.join(failed)}")


if __name__ == "__main__":
    main()
