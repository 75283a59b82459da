"""A plan as tables in the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from megatron_sod.plan.measured import MeasuredRun
from megatron_sod.plan.memory import PHASES, Components, Stage, kv_bytes_per_token, kv_cache_bytes
from megatron_sod.plan.plan import GIB, Plan
from megatron_sod.plan.roles import Role
from megatron_sod.plan.simulate import IterationTimes
from megatron_sod.plan.traffic import GROUPS

MAX_ROLE_ROWS = 24  # of larger jobs the first and the last are shown


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Write all tables, then the verdict."""
    console = console or _console()
    unit = _unit(plan)
    console.print(_header(plan), highlight=False, markup=False)
    console.print(_role_table(plan))
    for stage in plan.memory:
        console.print(_memory_table(plan, stage, unit))
    if plan.engine_only:
        console.print(_engine_table(plan.engine_only, unit))
    console.print(_traffic_table(plan))
    console.print(_time_table(plan))
    for line in _verdict(plan):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _console() -> Console:
    """As wide as the terminal; wide enough for the tables when there is none."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=120)


def _header(plan: Plan) -> str:
    job, work = plan.job, plan.job.workload
    models = f"student {job.student.path}"
    if job.teacher is not None:
        models += f", teacher {job.teacher.path}"
    lines = [
        f"{job.name}: {job.cluster.num_nodes} x {job.cluster.gpus_per_node} {job.hardware.name} "
        f"({job.hardware.source}), {models}",
        f"an iteration: {work.num_trajectories} trajectories, {work.tokens / 1e6:.2f} M tokens, "
        f"{work.rows / 1e6:.2f} M carry loss, {work.num_optimizer_steps} optimizer step(s)",
    ]
    if job.rollout is not None:
        tokens = kv_cache_bytes(job) / kv_bytes_per_token(job)
        engine = job.rollout.engine
        lines.append(
            f"rollout: {engine.num_engines} engine(s) of {engine.tensor_parallel_size}, "
            f"{job.rollout.placement}; KV cache of each {tokens / 1e3:.0f} k tokens"
        )
    return "\n".join(lines)


def _role_table(plan: Plan) -> Table:
    """One line for each run of ranks that differ only in their tensor and context rank."""
    table = Table(title="Ranks", title_justify="left")
    for name in ("ranks", "node", "pipeline stage", "data", "context", "tensor", "expert"):
        table.add_column(name)
    table.add_column("teacher stage")
    table.add_column("engine")

    def key(role: Role):
        return (role.node, role.pp, role.dp, role.teacher_pp)

    runs = [(place, list(group)) for place, group in groupby(plan.roles, key)]
    hidden = range(MAX_ROLE_ROWS - 4, len(runs) - 4) if len(runs) > MAX_ROLE_ROWS else range(0)
    for number, ((node, pp, dp, teacher_pp), roles) in enumerate(runs):
        if number in hidden:
            if number == hidden.start:
                table.add_row(f"... {len(hidden)} more rows")
            continue
        table.add_row(
            _span(role.rank for role in roles),
            str(node),
            str(pp),
            str(dp),
            _span(role.cp for role in roles),
            _span(role.tp for role in roles),
            _span(role.ep for role in roles),
            str(teacher_pp) if plan.job.teacher else "-",
            _span(role.engine for role in roles if role.engine is not None),
        )
    return table


def _span(numbers) -> str:
    values = sorted(set(numbers))
    if not values:
        return "-"
    return str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"


class Unit(NamedTuple):
    """What sizes are shown in: GiB, or MiB for models that are smaller than that."""

    name: str
    size: int

    def show(self, num_bytes: int | None) -> str:
        return "" if num_bytes is None else f"{num_bytes / self.size:.2f}"


def _unit(plan: Plan) -> Unit:
    largest = max(sum(c.values()) for phases in plan.memory.values() for c in phases.values())
    return Unit("GiB", GIB) if largest >= GIB else Unit("MiB", 2**20)


def _memory_table(plan: Plan, stage: Stage, unit: Unit) -> Table:
    phases = [phase for phase in PHASES if phase in plan.memory[stage]]
    title = f"Memory of a rank on pipeline stage {stage.pp}, {unit.name}"
    if plan.job.rollout is not None and not stage.has_engine and not plan.engine_only:
        title += ", no engine"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for phase in phases:
        table.add_column(phase, justify="right")
    names = dict.fromkeys(name for phase in phases for name in plan.memory[stage][phase])
    for name in names:
        sizes = [plan.memory[stage][phase].get(name) for phase in phases]
        table.add_row(name, *map(unit.show, sizes))
    sums = [sum(plan.memory[stage][phase].values()) for phase in phases]
    table.add_section()
    table.add_row("total", *map(unit.show, sums))
    limit = plan.job.hardware.memory_bytes
    if limit is not None:
        marked = [f"[{'red' if size > limit else 'green'}]{size / limit:.0%}" for size in sums]
        table.add_row(f"of {unit.show(limit)}", *marked)
    return table


def _engine_table(components: Components, unit: Unit) -> Table:
    table = Table(title=f"Memory of an engine's GPU, {unit.name}", title_justify="left")
    table.add_column("")
    table.add_column("rollout", justify="right")
    for name, size in components.items():
        table.add_row(name, unit.show(size))
    table.add_section()
    table.add_row("total", unit.show(sum(components.values())))
    return table


def _traffic_table(plan: Plan) -> Table:
    table = Table(title="Bytes a rank sends in an iteration", title_justify="left")
    table.add_column("group")
    table.add_column("GB", justify="right")
    for group, size in plan.traffic.items():
        table.add_row(GROUPS[group], f"{size / 1e9:,.3f}" if size < 1e9 else f"{size / 1e9:,.1f}")
    return table


def _time_table(plan: Plan) -> Table:
    """Simulated for an iteration of distillation; an optimizer step for SFT."""
    table = Table(title="Estimated time (not measured)", title_justify="left")
    table.add_column("phase")
    table.add_column("s", justify="right")
    table.add_column("share", justify="right")
    times = plan.iteration
    if times is None:
        table.add_row("optimizer step", f"{plan.times.train_s:.2f}", "100%")
        return table
    for phase, share in times.phase_shares.items():
        table.add_row(phase, f"{getattr(times, phase + '_s'):.2f}", f"{share:.0%}")
    table.add_section()
    table.add_row("iteration", f"{times.step_s:.2f}", "")
    table.add_row("GPU time idle", "", f"{times.idle_share:.0%}")
    return table


def _verdict(plan: Plan) -> list[str]:
    if not plan.problems:
        checked = plan.job.hardware.memory_bytes is not None
        return ["fits" if checked else "memory is not checked on CPU"]
    return [f"does not fit: {problem}" for problem in plan.problems]


def print_what_if(rows: Iterable[IterationTimes]) -> None:
    """Step time and idle shares of each variant, as they are simulated."""
    table = Table(title="Simulated iterations", title_justify="left")
    names = ("GPUs", "placement", "staleness", "rollout s", "score s", "train s", "transfer s")
    for name in (*names, "step s", "GPU idle", "tokens/s/GPU"):
        table.add_column(name, justify="left" if name == "placement" else "right", no_wrap=True)
    for times in rows:
        seconds = (times.rollout_s, times.score_s, times.train_s, times.transfer_s, times.step_s)
        table.add_row(
            str(times.num_gpus),
            times.placement,
            str(times.staleness),
            *(f"{value:.1f}" for value in seconds),
            f"{times.idle_share:.0%}",
            f"{times.tokens_per_gpu_s:.0f}",
        )
    _console().print(table)


def print_comparison(pairs: list[tuple[MeasuredRun, IterationTimes]]) -> None:
    """Measured and predicted seconds of each phase; the first run is the one fitted to."""
    table = Table(title="Measured and predicted seconds of an iteration", title_justify="left")
    for name in ("prompts", "phase", "measured s", "share", "predicted s", "share", "error"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for run, times in pairs:
        for phase, seconds in run.seconds.items():
            predicted = getattr(times, f"{phase}_s")
            table.add_row(
                str(run.config.train.train_batch_size),
                phase,
                f"{seconds:.2f}",
                f"{run.shares[phase]:.1%}",
                f"{predicted:.2f}",
                f"{times.phase_shares[phase]:.1%}",
                f"{predicted / seconds - 1:+.0%}",
            )
        table.add_section()
    _console().print(table)
