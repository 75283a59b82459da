"""Which rank holds the job up, from what all ranks say about themselves. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]  # Status.snapshot(), plus `unheard_s` and `is_gone`
_SAME_SHAPE = ("all_reduce", "broadcast", "reduce")


@dataclass(frozen=True)
class Verdict:
    """Why the job must end."""

    message: str
    ranks: tuple[int, ...]  # to blame; empty when unknown
    is_expected: bool = False  # a rank that failed with a message of its own


def diagnose(table: Sequence[Record], *, stall_timeout_s: float) -> Verdict | None:
    """None while the job is healthy.

    Args:
        table: one record per rank, in rank order. `unheard_s`: seconds since the rank last spoke;
            `is_gone`: its process has ended, as seen on this machine; None: cannot be seen.
    """
    running = [r for r, record in enumerate(table) if record["state"] != "ended"]
    gone = tuple(r for r in running if table[r]["is_gone"])
    if gone:
        failed = tuple(r for r in gone if table[r]["state"] == "failed")
        died = tuple(r for r in gone if r not in failed)
        if failed:
            return Verdict(f"{_names(failed)} failed; see its message", failed, is_expected=True)
        return Verdict(f"{_each(table, died)} died: its process is gone (killed or crashed)", died)
    ending = [r for r in running if table[r]["state"] == "failed"]
    if any(table[r]["quiet_s"] <= stall_timeout_s for r in ending):
        return None  # it cleans up, with a message of its own
    is_stuck = all(_is_stuck(table[r], stall_timeout_s) for r in running)
    # When nobody moves, a rank that does not even speak is the reason.
    patience_s = stall_timeout_s / 2 if is_stuck else stall_timeout_s
    silent = tuple(r for r in running if table[r]["unheard_s"] > patience_s)
    if silent:
        return Verdict(
            f"{_each(table, silent)} has not been heard of for {patience_s:.0f} s: stopped, or its "
            "machine is lost",
            silent,
        )
    if not running or not is_stuck:
        return None
    return _stalled(table, running, stall_timeout_s)


def _is_stuck(record: Record, stall_timeout_s: float) -> bool:
    return record["patience_s"] <= 0 and record["quiet_s"] > stall_timeout_s


def _stalled(table: Sequence[Record], running: list[int], stall_timeout_s: float) -> Verdict:
    since = f"no rank has moved for {stall_timeout_s:.0f} s"
    busy = tuple(r for r in running if not table[r]["in_collective"])
    if busy and len(busy) < len(running):
        return Verdict(f"{since}: the others wait for {_each(table, busy)}", busy)
    waiting = [r for r in running if table[r]["collective"] is not None]
    for one in waiting:
        for other in waiting:
            if one < other and _mismatch(table[one]["collective"], table[other]["collective"]):
                ranks = (one, other)
                return Verdict(
                    f"{since}: collective mismatch, {_each(table, ranks)} do not fit", ranks
                )
    if waiting and len({table[r]["collective"]["group"] for r in waiting}) == 1:
        fewest = min(table[r]["collective"]["number"] for r in waiting)
        behind = tuple(r for r in waiting if table[r]["collective"]["number"] == fewest)
        if len(behind) < len(waiting):
            return Verdict(f"{since}: {_each(table, behind)} is behind the others", behind)
    return Verdict(f"{since}: {_each(table, running[:4])}", ())


def _mismatch(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Two ranks whose next collective in one group is not the same call."""
    if (one["group"], one["ranks"]) != (other["group"], other["ranks"]):
        return False
    if "send" in (one["name"], other["name"]) or "recv" in (one["name"], other["name"]):
        return False
    if one["number"] != other["number"]:
        return False
    differs = one["name"] != other["name"] or one["dtype"] != other["dtype"]
    shapes = one["shape"] != other["shape"] and one["name"] in _SAME_SHAPE
    return differs or shapes


def _each(table: Sequence[Record], ranks: Sequence[int]) -> str:
    return " and ".join(f"rank {r} ({describe(table[r])})" for r in ranks)


def _names(ranks: Sequence[int]) -> str:
    return " and ".join(f"rank {r}" for r in ranks)


def describe(record: Record) -> str:
    """One rank in a phrase: "pid 7 on a, iteration 3, train, micro-batch 2/4, in all_reduce"."""
    parts = [f"pid {record['pid']} on {record['host']}", f"iteration {record['iteration']}"]
    parts.append(record["phase"])
    if record["micro_batch"]:
        parts.append("micro-batch {}/{}".format(*record["micro_batch"]))
    if record["collective"]:
        word = "in" if record["in_collective"] else "last collective"
        parts.append(f"{word} {_collective(record['collective'])}")
    return ", ".join(parts)


def _collective(collective: Mapping[str, Any]) -> str:
    shape = (
        "" if collective["shape"] is None else f" {collective['dtype']}{list(collective['shape'])}"
    )
    return f"{collective['name']}{shape} #{collective['number']} of {collective['group']}"


def as_table(table: Sequence[Record]) -> str:
    """All ranks, one line each, for RUN/stall/ranks.txt."""
    return "".join(
        f"rank {rank}: {record['state']}, {describe(record)}, quiet for {record['quiet_s']:.1f} s, "
        f"unheard for {record['unheard_s']:.1f} s\n"
        for rank, record in enumerate(table)
    )
