"""Where the time of an iteration goes, as an SVG: bars per variant, one colour per phase."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

from megatron_sod.plan.simulate import IterationTimes

COLOURS = {
    "rollout": "#4c78a8",
    "score": "#f58518",
    "train": "#54a24b",
    "transfer": "#b279a2",
    "waiting": "#c8c8c8",
}
LEFT, WIDTH, BAR, GAP, TOP = 80, 680, 22, 14, 44  # pixels
Pieces = list[tuple[str, float]]  # (phase, seconds) in order


def draw_iterations(iterations: list[tuple[str, IterationTimes]], out: str | Path) -> Path:
    """Stacked bars: the GPUs of a colocated run; engines and trainers where they are apart.

    Args:
        iterations: (label, times) from top to bottom.
        out: an .svg file.
    """
    longest = max(times.step_s for _, times in iterations)
    scale, y = WIDTH / longest, TOP
    body = list(_legend())
    for label, times in iterations:
        body.append(_text(LEFT, y + 14, label))
        y += 20
        for side, pieces in _sides(times).items():
            body.append(_text(LEFT - 8, y + BAR - 6, side, anchor="end"))
            body += _bar(pieces, y, scale)
            y += BAR + 2
        end = LEFT + times.step_s * scale
        body.append(_text(end + 6, y - 8, f"{times.step_s:.0f} s"))
        y += GAP
    body.append(_text(LEFT, y + 8, "simulated seconds of one iteration, from the left"))
    width, height = LEFT + WIDTH + 70, y + 20
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="13">'
    )
    background = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    file = Path(out)
    file.write_text("\n".join([head, background, *body, "</svg>"]) + "\n")
    return file


def _sides(times: IterationTimes) -> dict[str, Pieces]:
    """An engine's idle time is spread over the rollout; it is drawn at the rollout's end."""
    busy = times.rollout_s * (1 - times.engine_idle_share)
    rollout: Pieces = [("rollout", busy), ("waiting", times.rollout_s - busy)]
    training: Pieces = [("score", times.score_s), ("train", times.train_s)]
    last = ("transfer", times.transfer_s)
    if times.placement == "colocated":
        return {"GPUs": [*rollout, *training, last]}
    before = times.step_s - times.transfer_s
    engines = [*rollout, ("waiting", before - times.rollout_s), last]
    wait = ("waiting", before - times.score_s - times.train_s)
    trainers = [*training, wait, last] if times.staleness else [wait, *training, last]
    return {"engines": engines, "trainers": trainers}


def _bar(pieces: Pieces, y: float, scale: float) -> Iterator[str]:
    x = float(LEFT)
    for phase, seconds in pieces:
        width = seconds * scale
        yield (
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" '
            f'fill="{COLOURS[phase]}"><title>{phase} {seconds:.1f} s</title></rect>'
        )
        x += width


def _legend() -> Iterator[str]:
    for number, (phase, colour) in enumerate(COLOURS.items()):
        x = LEFT + number * 105
        yield f'<rect x="{x}" y="12" width="14" height="14" fill="{colour}"/>'
        yield _text(x + 20, 24, phase)


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#202020">{escape(text)}</text>'
    )
