"""The demo's results and controls as one table: seeds 0, 1, 2 of SOD; lr 0, GRPO and OPD on seed 0.

python tools/demo_table.py [--only sod-0,grpo]     writes docs/demo_results.md
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "sod-0": ("SOD, seed 0", ["seed=0"]),
    "sod-1": ("SOD, seed 1", ["seed=1"]),
    "sod-2": ("SOD, seed 2", ["seed=2"]),
    "lr0": ("learning rate 0", ["train.lr=0.0"]),
    "grpo": ("method=grpo", ["method=grpo"]),
    "opd": ("method=opd", ["method=opd"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(RUNS), help="comma-separated subset")
    arguments = parser.parse_args()
    for name in arguments.only.split(","):
        run(name, RUNS[name][1])
    write_table(ROOT / "docs/demo_results.md")


def run(name: str, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "tools/train_sod.py", "--config", "configs/demo_cpu.yaml"]
    command += [f"name=table-{name}", "train.resume=never", *overrides]
    print(" ".join(command[3:]), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def write_table(path: Path) -> None:
    lines = [
        "# Results of the demo",
        "",
        f"Made by `make demo-controls` on {date.today()}, two CPU cores. Success on 256 held-out",
        "tasks, one sample each, temperature 1, with 95 % intervals.",
        "",
        "| run | before | after | gain, points | teacher | iterations | tokens | wall, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (label, _) in RUNS.items():
        summary_path = ROOT / f"runs/table-{name}/summary.json"
        if summary_path.is_file():
            lines.append(row(label, json.loads(summary_path.read_text())))
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


def row(label: str, s: dict) -> str:
    gain = 100 * (s["student_after"] - s["student_before"])
    cells = [
        f"{s[k]:.1%} [{s[k + '_interval'][0]:.1%}, {s[k + '_interval'][1]:.1%}]"
        for k in ("student_before", "student_after")
    ]
    return (
        f"| {label} | {cells[0]} | {cells[1]} | {gain:+.1f} | {s['teacher']:.1%} | "
        f"{s['iterations']} | {s['tokens']} | {s['wall_s']:.0f} |"
    )


if __name__ == "__main__":
    main()
