"""Plans of the shipped configurations as numbers: python -m tests.plan.golden writes them anew.

Look at the difference before committing it: a changed number is a changed claim about memory or
traffic.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_sod.config.load import load_config
from megatron_sod.plan.plan import Plan, make_plan

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("golden_plans.json")
MIB = 2**20


def shipped() -> list[Path]:
    """Configurations named after a cluster: <method>_<student>_<teacher>_2n8g_<layout>.yaml."""
    files = sorted((ROOT / "configs").glob("*.yaml"))
    return [file for file in files if re.search(r"_\d+n\d+g_", file.name)]


def numbers(plan: Plan) -> dict:
    """MiB of every component in every phase, stage by stage; megabytes sent per group."""
    return {
        "memory_mib": {
            f"stage {stage.pp}/{stage.teacher_pp}, engine {stage.has_engine}": {
                phase: {name: round(size / MIB) for name, size in components.items()}
                for phase, components in phases.items()
            }
            for stage, phases in plan.memory.items()
        },
        "traffic_mb": {group: round(size / 1e6) for group, size in plan.traffic.items()},
    }


def main() -> None:
    plans = {file.name: numbers(make_plan(load_config(file))) for file in shipped()}
    FILE.write_text(json.dumps(plans, indent=1) + "\n")
    print(f"{len(plans)} plans written to {FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
