"""Where the time of an iteration goes, as an SVG: one bar per variant, one colour per phase."""

from __future__ import annotations

from pathlib import Path

from megatron_sod.plan.simulate import IterationTimes

COLOURS = {
    "rollout": "#4c78a8",
    "score": "#f58518",
    "train": "#54a24b",
    "transfer": "#b279a2",
    "waiting": "#d8d8d8",
}


def draw_iterations(iterations: list[tuple[str, IterationTimes]], out: str | Path) -> Path:
    """Two stacked bars per variant: what the engines do, and what the trainers do.

    Args:
        iterations: (label, times) from top to bottom.
        out: file; its suffix chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "megatron_sod"  # the same file for the same numbers
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.9 * len(iterations)))
    ticks = []
    for number, (label, times) in enumerate(iterations):
        for offset, (side, pieces) in enumerate(_sides(times).items()):
            y, left = number * 2.6 + offset, 0.0
            for phase, seconds in pieces:
                axes.barh(y, seconds, left=left, height=0.9, color=COLOURS[phase])
                left += seconds
            ticks.append((y, f"{label}\n{side}" if offset == 0 else side))
        axes.text(times.step_s, number * 2.6 + 0.5, f" {times.step_s:.0f} s", va="center")
    axes.set_yticks([y for y, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("simulated seconds of one iteration")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colour, label=phase) for phase, colour in COLOURS.items()]
    axes.legend(
        handles=handles,
        ncols=len(handles),
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        fontsize=8,
    )
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if str(out).endswith(".svg") else None)
    plt.close(figure)
    return Path(out)


def _sides(times: IterationTimes) -> dict[str, list[tuple[str, float]]]:
    """(phase, seconds) in order, for engines and trainers. An engine's idle time is spread over
    the rollout and shown at its end."""
    busy = times.rollout_s * (1 - times.engine_idle_share)
    engines = [("rollout", busy), ("waiting", times.step_s - times.transfer_s - busy)]
    training = times.score_s + times.train_s
    wait = ("waiting", max(0.0, times.step_s - times.transfer_s - training))
    trainers = [wait, ("score", times.score_s), ("train", times.train_s)]
    last = ("transfer", times.transfer_s)
    return {"engines": [*engines, last], "trainers": [*trainers, last]}
