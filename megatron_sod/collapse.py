"""What a run does when the watchdog sees it collapse: say so, save and end, or go back.

Going back restores weights and optimizer from the last checkpoint made before the first bad
iteration, and continues with the prompts that come next: the same prompts and seeds would end where
they ended before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from megatron_sod.errors import WatchdogAlarm
from megatron_sod.observe.progress import say
from megatron_sod.observe.watchdog import Alarm, Watchdog
from megatron_sod.parallel.share import from_rank0
from megatron_sod.session import Session
from megatron_sod.train import checkpoint_files

ALARMS = "alarms.jsonl"
_TIMEOUT_S = 60.0


def answer_alarms(
    session: Session, metrics: dict[str, float], transfer: Callable[[Session, int], dict]
) -> None:
    """Ask the watchdog about the iteration just finished, and act as `watchdog.action` says.

    A collective. `transfer` puts the student's weights into the engines as a new policy version.

    Raises:
        WatchdogAlarm: on every rank; the state is saved.
    """
    alarms = from_rank0(lambda: _new_alarms(session, metrics), timeout_s=_TIMEOUT_S)
    if not alarms or session.config.watchdog.action == "warn":
        return
    since = min(alarm.since for alarm in alarms)
    good = _last_good(session, since)
    if session.config.watchdog.action == "rollback" and good is not None:
        _roll_back(session, good, transfer)
    else:
        _pause(session, alarms, since)


def open_watchdog(session: Session) -> Watchdog:
    """The watchdog of a run that may be resumed: it remembers how the run began.

    A run resumed inside a collapse pauses or goes back again; one that only warns has warned.
    """
    done = session.progress.iteration - 1  # before the iteration it is first asked about
    rows = session.run_dir.rows("metrics.jsonl")
    history = [row for row in rows if row["iteration"] <= done]
    config = session.config.watchdog
    said = _said_until(session, done) if config.action == "warn" else set()
    return Watchdog(config, history, said)


def _said_until(session: Session, iteration: int) -> set[tuple[str, int]]:
    """(signal, since) of the alarms of these iterations, less those taken back."""
    said: set[tuple[str, int]] = set()
    for row in session.run_dir.rows(ALARMS):
        if "back_to" in row:
            said = {(signal, since) for signal, since in said if since <= row["back_to"]}
        elif row["iteration"] <= iteration:
            said.add((row["signal"], row["since"]))
    return said


def _new_alarms(session: Session, metrics: dict[str, float]) -> list[Alarm]:
    """Alarms that this process has not answered yet, said and written down."""
    if session.watchdog is None:
        session.watchdog = open_watchdog(session)
    new = session.watchdog.news({"iteration": session.progress.iteration, **metrics})
    for alarm in new:
        say(f"watchdog: {alarm}")
        row = asdict(alarm) | {"signal": alarm.signal.key, "metric": alarm.signal.metric}
        session.run_dir.append(ALARMS, row | {"action": session.config.watchdog.action})
    return new


def _last_good(session: Session, since: int) -> Path | None:
    """The newest checkpoint from before `since`; None without one, or after max_rollbacks."""

    def find() -> str | None:
        rows = session.run_dir.rows(ALARMS)
        if sum("back_to" in row for row in rows) >= session.config.watchdog.max_rollbacks:
            return None
        made = checkpoint_files.complete_checkpoints(session.checkpoints.folder)
        good = [path for path in made if checkpoint_files.iteration_of(path) < since]
        return str(good[-1]) if good else None

    session.checkpoints.finish()
    found = from_rank0(find, timeout_s=_TIMEOUT_S)
    return None if found is None else Path(found)


def _roll_back(session: Session, good: Path, transfer: Callable[[Session, int], dict]) -> None:
    bad = session.progress
    restored = session.load(good)
    session.progress = replace(
        restored, num_prompts_drawn=bad.num_prompts_drawn, policy_version=bad.policy_version + 1
    )
    if session.is_main:
        session.run_dir.append(ALARMS, {"iteration": bad.iteration, "back_to": restored.iteration})
        session.run_dir.set_aside_after(restored.iteration)
        checkpoint_files.take_back(session.checkpoints.folder, good, restored.best_iteration)
        assert session.watchdog is not None, "rank 0 has asked it"
        session.watchdog.forget_after(restored.iteration)
        if session.rollouts is not None:
            session.rollouts.discard()
    transfer(session, session.progress.policy_version)
    say(
        f"watchdog: back to iteration {restored.iteration} ({good.name}); training goes on with "
        "the prompts after those of the iterations taken back"
    )


def _pause(session: Session, alarms: list[Alarm], since: int) -> None:
    session.checkpoints.finish()
    latest, iteration = session.checkpoints.latest(), session.progress.iteration
    saved = 0 if latest is None else checkpoint_files.iteration_of(latest)
    # A run started again and again inside a collapse must not push its good checkpoints out.
    if saved < max(since, iteration - 1):
        session.save()
        session.checkpoints.finish()
    raise WatchdogAlarm(
        f"iteration {iteration}: training looks like it is collapsing: "
        + "; ".join(str(alarm) for alarm in alarms)
        + f". The state is saved in {session.checkpoints.folder}. Look at the report "
        f"(tools/inspect_run.py {session.run_dir.path}), then start again: watchdog.action=warn "
        f"goes on from here, train.resume=DIR from an iter_* folder before iteration {since}; the "
        "same command pauses again as long as this lasts"
    )
