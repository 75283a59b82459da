"""What trajectories wait for while they are rolled out: engines and tools."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_sod.observe.metrics import spread


@dataclass
class Waits:
    """Wall seconds one trajectory waited for."""

    generate_s: float = 0.0
    tools_s: float = 0.0

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.monotonic() - begin)


@dataclass(frozen=True)
class Took:
    """What one trajectory took in this rollout."""

    generate_s: float  # waiting for the engine
    tools_s: float  # waiting for tools
    prompt_length: int
    response_length: int


def waiting_metrics(took: Sequence[Took]) -> dict[str, float]:
    """Seconds trajectories waited for engines and tools, and the slowest of them all."""
    if not took:
        return {}
    slowest = max(took, key=lambda t: t.generate_s + t.tools_s)
    return {
        **spread("time/generate_s", [t.generate_s for t in took]),
        **spread("time/tools_s", [t.tools_s for t in took]),
        "time/slowest_generate_s": slowest.generate_s,
        "time/slowest_tools_s": slowest.tools_s,
        "time/slowest_prompt_length": float(slowest.prompt_length),
        "time/slowest_response_length": float(slowest.response_length),
    }
