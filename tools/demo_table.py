"""The demo's world as tables of results.

python tools/demo_table.py [--only sod-0,grpo]           docs/demo_results.md: seeds and controls
python tools/demo_table.py --table methods [--only opd]  docs/methods_results.md: all, one seed
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


# A self-teacher is the student's own start; its rows are the demo's with the answer or a hint.
SELF = ["teacher.path=configs/demo/student", "eval.teacher=false"]
METHODS = {
    "sod": ("SOD", ["method=sod"]),
    "sod_no_grpo": ("SOD without GRPO", ["method=sod_no_grpo"]),
    "sod_no_cap": ("SOD, w_k without cap", ["method=sod_no_cap"]),
    "sod_running_clip": ("SOD, running clip", ["method=sod_running_clip"]),
    "sod_heuristic": ("0.9 per step after an error", ["method=sod_heuristic"]),
    "sod_mask_after_wrong": ("nothing after an error", ["method=sod_mask_after_wrong"]),
    "opd": ("OPD", ["method=opd"]),
    "opd_naive": ("OPD without GRPO", ["method=opd_naive"]),
    "opsd_gt": ("OPSD, answer", ["method=opsd_gt", *SELF]),
    "opsd_hint": ("OPSD, hint", ["method=opsd_hint", *SELF]),
    "grpo": ("GRPO", ["method=grpo"]),
    "sod_sampled": ("SOD, sampled_advantage", ["method=sod", "distill.loss=sampled_advantage"]),
    "sod_separate": ("SOD, sampled_separate", ["method=sod", "distill.loss=sampled_separate"]),
    "sod_forward_kl": ("SOD, forward_kl", ["method=sod", "distill.loss=forward_kl"]),
    "sod_jsd": ("SOD, jsd", ["method=sod", "distill.loss=jsd"]),
    "sod_withdrawn": (
        "SOD, teacher withdrawn over iterations 20 to 40",
        ["method=sod", "distill.withdraw={start_iteration: 20, end_iteration: 40}"],
    ),
}
# table: (runs, page, title, command)
TABLES = {
    "demo": (RUNS, "docs/demo_results.md", "Results of the demo", "make demo-controls"),
    "methods": (
        METHODS,
        "docs/methods_results.md",
        "Every method on the demo's world",
        "make methods-table",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=TABLES, default="demo")
    parser.add_argument("--only", help="comma-separated subset of the table's runs")
    parser.add_argument("overrides", nargs="*", help="dotted key=value for every run")
    arguments = parser.parse_args()
    runs, *_ = TABLES[arguments.table]
    for name in (arguments.only or ",".join(runs)).split(","):
        run(f"{arguments.table}-{name}", [*runs[name][1], *arguments.overrides])
    write_table(arguments.table)


def run(name: str, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "tools/train_sod.py", "--config", "configs/demo_cpu.yaml"]
    command += [f"name=table-{name}", "train.resume=never", *overrides]
    print(" ".join(command[3:]), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def write_table(table: str) -> None:
    runs, page, title, command = TABLES[table]
    path = ROOT / page
    lines = [
        f"# {title}",
        "",
        f"Made by `{command}` on {date.today()}, two CPU cores. Success on 256 held-out",
        "tasks, one sample each, temperature 1, with 95 % intervals; one seed unless it says so.",
        "",
        "| run | before | after | gain, points | teacher | iterations | tokens | wall, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (label, _) in runs.items():
        summary_path = ROOT / f"runs/table-{table}-{name}/summary.json"
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
    teacher = f"{s['teacher']:.1%}" if "teacher" in s else "-"
    return (
        f"| {label} | {cells[0]} | {cells[1]} | {gain:+.1f} | {teacher} | "
        f"{s['iterations']} | {s['tokens']} | {s['wall_s']:.0f} |"
    )


if __name__ == "__main__":
    main()
