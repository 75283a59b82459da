"""Plans of the shipped configurations as numbers: python -m tests.plan.golden writes them anew.

Look at the difference before committing it: a changed number is a changed claim about memory or
traffic.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_sod.config.load import load_config, load_sft_config
from megatron_sod.plan.plan import Plan, make_plan

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("golden_plans.json")
MIB = 2**20


def shipped() -> list[Path]:
    """Configurations named after a cluster: <method>_<student>_<teacher>_2n8g_<layout>.yaml."""
    files = sorted((ROOT / "configs").glob("*.yaml"))
    return [file for file in files if re.search(r"_\d+n\d+g[_.]", file.name)]


def plan_of(file: Path) -> Plan:
    load = load_sft_config if file.name.startswith("sft_") else load_config
    return make_plan(load(file))


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
    plans = {file.name: numbers(plan_of(file)) for file in shipped()}
    lines = [f"{json.dumps(name)}: {json.dumps(plan)}" for name, plan in plans.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(plans)} plans written to {FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
