"""What training shows: a panel that redraws itself on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_sod.observe import terminal
from megatron_sod.observe.progress import Lines, is_main_process

Metrics = dict[str, float]
_LINE = {
    "reward": "rollout/reward_mean",
    "w": "sod/w_mean",
    "d": "sod/d_mean",
    "grad_norm": "actor/grad_norm",
    "s/it": "time/total_s",
}
_SPARK = " ▁▂▃▄▅▆▇█"


class TrainingView:
    """Shows nothing: what ranks other than 0 have."""

    def phase(self, name: str) -> None:
        """The loop enters a phase: rollout, score, ..."""

    def update(self, iteration: int, metrics: Metrics) -> None:
        """An iteration is complete."""

    def evaluated(self, model: str, success: float, interval: tuple[float, float]) -> None:
        """An evaluation of `model` (student, teacher) is complete."""


class _LineView(TrainingView):
    def __init__(self, name: str, total: int, start: int):
        self._what = (name, total, "iteration", start)
        self._lines: Lines | None = None

    def phase(self, name: str) -> None:
        if self._lines is None and name == "rollout":  # evaluations before are no iteration
            self._lines = Lines(*self._what)

    def update(self, iteration: int, metrics: Metrics) -> None:
        values: dict[str, float | str] = {
            short: metrics[long] for short, long in _LINE.items() if long in metrics
        }
        if speed := tokens_per_s(metrics):
            values["tokens/s"] = f"{speed:.0f}"
        if (failed := failed_tools(metrics)) is not None:
            values["failed tools"] = f"{failed:.1%}"
        if self._lines is not None:
            self._lines.update(iteration, **values)


class _PanelView(TrainingView):
    """Holds the latest values; `__rich__` draws them, several times a second."""

    def __init__(self, name: str, total: int, start: int):
        self._name, self._total, self._done = name, total, start
        self._phase, self._phase_began = "starting", time.monotonic()
        self._metrics: Metrics = {}
        self._success: dict[str, tuple[float, tuple[float, float]]] = {}
        self._recent: deque[float] = deque(maxlen=10)  # seconds per iteration
        self._history: dict[str, deque[float]] = {}
        self._last = time.monotonic()

    def phase(self, name: str) -> None:
        self._phase, self._phase_began = name, time.monotonic()

    def update(self, iteration: int, metrics: Metrics) -> None:
        now = time.monotonic()
        self._recent.append(now - self._last)
        self._done, self._metrics, self._last = iteration, metrics, now
        for name in ("rollout/reward_mean", "sod/w_mean"):
            if name in metrics:
                self._history.setdefault(name, deque(maxlen=40)).append(metrics[name])

    def evaluated(self, model: str, success: float, interval: tuple[float, float]) -> None:
        self._success[model] = (success, interval)
        self._last = time.monotonic()  # the evaluations before training are no iteration

    def __rich__(self) -> RenderableType:
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column(overflow="fold")
        for label, text in self._rows():
            rows.add_row(label, text)
        bar = Table.grid(expand=True, padding=(0, 2))
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(
            f"iteration {self._done}/{self._total}",
            ProgressBar(total=max(self._total, 1), completed=self._done, complete_style="blue"),
            self._time_left(),
        )
        return Panel(Group(bar, rows), title=self._name, title_align="left", border_style="blue")

    def _time_left(self) -> str:
        if not self._recent:
            return "time left unknown"
        each = sum(self._recent) / len(self._recent)
        return f"{duration(each * (self._total - self._done))} left"

    def _rows(self) -> Iterator[tuple[str, RenderableType]]:
        metrics = self._metrics
        yield "phase", f"{self._phase}, {duration(time.monotonic() - self._phase_began)}"
        if self._success:
            yield (
                "success",
                ", ".join(
                    f"{model} {success:.1%} ({low:.1%} to {high:.1%})"
                    for model, (success, (low, high)) in self._success.items()
                ),
            )
        for label, name in (("reward", "rollout/reward_mean"), ("trust w_k", "sod/w_mean")):
            if name in metrics:
                text = Text(f"{metrics[name]:.3f}  ")
                yield label, text.append(spark(self._history[name]), style="cyan")
        failed = failed_tools(metrics)
        if failed is not None:
            calls = metrics.get("rollout/tool_calls_avg", 0.0)
            lost = metrics.get("rollout/infra_error_rate", 0.0)
            yield (
                "tools",
                Text(
                    f"{calls:.1f} calls per trajectory, {failed:.1%} failed, "
                    f"{lost:.1%} of trajectories lost to infrastructure",
                    style="red" if lost > 0.01 else "",
                ),
            )
        if speed := tokens_per_s(metrics):
            yield "speed", f"{speed:,.0f} tokens/s, {duration(iteration_s(metrics))} per iteration"
        if memory := describe_memory(metrics):
            yield "memory", memory


def tokens_per_s(metrics: Metrics) -> float:
    """Rollout tokens over the wall time of an iteration without evaluation; 0 when unknown."""
    seconds = iteration_s(metrics)
    return metrics.get("rollout/tokens", 0.0) / seconds if seconds > 0 else 0.0


def iteration_s(metrics: Metrics) -> float:
    """Wall seconds of an iteration, without the evaluation that some have."""
    return metrics.get("time/total_s", 0.0) - metrics.get("time/eval_s", 0.0)


def failed_tools(metrics: Metrics) -> float | None:
    """Share of steps with a call whose outcome is not ok; None without any call."""
    rates = [v for n, v in metrics.items() if n.startswith("tool/") and n.endswith("_rate")]
    return 1.0 - metrics["tool/ok_rate"] if "tool/ok_rate" in metrics and sum(rates) > 0 else None


def describe_memory(metrics: Metrics) -> str:
    """Host and GPU memory in words; empty without telemetry."""
    parts = []
    if "memory/host_rss_sum_gb" in metrics:
        parts.append(f"trainers {metrics['memory/host_rss_sum_gb']:.1f} GB of host memory")
    if "memory/gpu_used_max_gb" in metrics:
        parts.append(f"fullest GPU {metrics['memory/gpu_used_max_gb']:.1f} GB")
    return ", ".join(parts)


def spark(values) -> str:
    """One character per value, from its lowest to its highest."""
    low, high = min(values), max(values)
    scale = (len(_SPARK) - 2) / (high - low) if high > low else 0.0
    return "".join(_SPARK[1 + round((value - low) * scale)] for value in values)


def duration(seconds: float) -> str:
    """3.2 s, 47 s, 5 min 20 s, 3 h 5 min."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextlib.contextmanager
def training_view(name: str, total: int, *, start: int = 0) -> Iterator[TrainingView]:
    """The view of a run of `total` iterations of which `start` were done before."""
    if not is_main_process():
        yield TrainingView()
    elif not terminal.stream().isatty():
        yield _LineView(name, total, start)
    else:
        console = Console(file=terminal.stream(), force_terminal=True)
        view = _PanelView(name, total, start)
        live = Live(
            view, console=console, refresh_per_second=4, redirect_stdout=False,
            redirect_stderr=False,
        )  # fmt: skip
        with live, terminal.owned_by(console):
            yield view
