"""What --dry-run does: print the plan; refuse a configuration that would not fit."""

from __future__ import annotations

from megatron_sod.config.schema import SftConfig, SodConfig
from megatron_sod.errors import ConfigError
from megatron_sod.plan.plan import make_plan
from megatron_sod.plan.report import print_plan


def dry_run(config: SodConfig | SftConfig) -> None:
    """
    Raises:
        ConfigError: a phase would not fit; the message names it and says what to change.
    """
    plan = make_plan(config)
    print_plan(plan)
    if plan.problems:
        phases = ", ".join(dict.fromkeys(line.partition(":")[0] for line in plan.problems))
        raise ConfigError(f"{config.name} does not fit in phase {phases}; see the lines above")
