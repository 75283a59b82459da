"""Where an iteration's trajectories come from, on rank 0: engines, now or one iteration ahead, or a
recording of an earlier run.

Every prompt is drawn once, in the data's order. With n prompts trained on and c groups carried over
from the last rollout, the next one continues these c and draws prompts n + c ... n + B + E, for a
batch of B and E prompts beyond it (rollout.partial_prompts).
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from megatron_sod.config.schema import SodConfig
from megatron_sod.data.order import PromptOrder
from megatron_sod.observe.progress import say
from megatron_sod.rollout.groups import GroupRequest, RolloutResult
from megatron_sod.rollout.recording import Recording, read_trajectories, write_trajectories
from megatron_sod.rollout.waiting import waiting_metrics
from megatron_sod.rollout.worker import GroupSampling
from megatron_sod.types import Prompt, Trajectory

_READY, _CARRIED, _INDEX = "rollout_ready.parquet", "rollout_carried.parquet", "rollout.json"


class Rollouts(Protocol):
    """What the pipeline asks, on rank 0."""

    metrics: dict[str, float]  # of the rollout collected last

    def collect(self, iteration: int, num_trained: int) -> list[Trajectory]:
        """This iteration's trajectories; `num_trained` prompts were trained on before it."""
        ...

    def start_ahead(self, iteration: int, num_trained: int) -> None:
        """Begin an iteration's rollout with the weights the engines have now."""
        ...

    def finish_ahead(self) -> None:
        """Wait for it; the engines are idle afterwards."""
        ...

    def discard(self) -> None:
        """Forget what has been rolled out and not trained on; its groups begin anew."""
        ...

    def store(self, folder: Path) -> None:
        """Put into a checkpoint what has been rolled out and not trained on."""
        ...


class RecordedRollouts:
    """Trajectories of an earlier run."""

    def __init__(self, recording: Recording):
        self._recording = recording
        self.metrics: dict[str, float] = {}

    def collect(self, iteration: int, num_trained: int) -> list[Trajectory]:
        return self._recording.read(iteration)

    def start_ahead(self, iteration: int, num_trained: int) -> None:
        """Nothing runs in a replay."""

    def finish_ahead(self) -> None:
        """Nothing runs in a replay."""

    def discard(self) -> None:
        """Nothing is ahead in a replay."""

    def store(self, folder: Path) -> None:
        """A replay has nothing that the recording has not."""


class LiveRollouts:
    """Trajectories from the engines."""

    def __init__(
        self,
        run: Callable[..., RolloutResult],
        prompts: list[Prompt],
        order: PromptOrder,
        config: SodConfig,
        recording: Recording | None = None,
    ):
        """`run`: RolloutController.run. `recording`: where everything collected is kept."""
        self._run, self._prompts, self._order, self._config = run, prompts, order, config
        self._recording = recording
        self._ahead: _Ahead | None = None
        self._ready: RolloutResult | None = None  # rolled out, not collected
        self._carried: list[GroupRequest] = []
        self._num_discarded = 0  # trajectories, since the last `collect`
        self.metrics: dict[str, float] = {}

    def collect(self, iteration: int, num_trained: int) -> list[Trajectory]:
        self.finish_ahead()
        result = self._ready
        if result is None:
            result = self._roll_out(iteration, num_trained)
        self._ready, self._carried = None, result.carried
        self.metrics = {"rollout/wall_s": result.wall_s, "rollout/carried": len(result.carried)}
        self.metrics |= waiting_metrics(result.took)
        self.metrics["rollout/discarded"] = float(self._num_discarded)
        self._num_discarded = 0
        if self._recording is not None:
            self._recording.write(iteration, result.trajectories)
        return result.trajectories

    def start_ahead(self, iteration: int, num_trained: int) -> None:
        assert self._ahead is None and self._ready is None, "a rollout is already under way"
        self._ahead = _Ahead(lambda: self._roll_out(iteration, num_trained))

    def finish_ahead(self) -> None:
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            self._ready = ahead.result()

    def discard(self) -> None:
        self.finish_ahead()
        carried = self._ready.carried if self._ready else self._carried
        ready = self._ready.trajectories if self._ready else []
        num_discarded = len(ready) + sum(len(group.begun) for group in carried)
        if num_discarded:
            self._num_discarded += num_discarded
            say(
                f"{num_discarded} trajectories rolled out ahead by weights that were taken back "
                "are thrown away; their prompts begin anew"
            )
        # All are kept as groups: those trained on are no prefix of the order, so that drawing
        # from its position would miss prompts and repeat others.
        groups = [*self._groups_of(ready), *carried]
        self._ready, self._carried = None, [replace(g, tag=f"{g.tag}+", begun=()) for g in groups]

    def _groups_of(self, trajectories: list[Trajectory]) -> list[GroupRequest]:
        """The requests that complete groups answer, in their order."""
        by_id = {prompt.prompt_id: prompt for prompt in self._prompts}
        names = Counter(t.trajectory_id.rpartition("/")[0] for t in trajectories)
        groups = []
        for name, count in names.items():
            prompt_id, _, tag = name.rpartition("/")
            groups.append(GroupRequest(by_id[prompt_id], tag, count))
        return groups

    def _roll_out(self, iteration: int, num_trained: int) -> RolloutResult:
        rollout, train = self._config.rollout, self._config.train
        is_last = iteration == train.num_iterations
        num_groups = train.train_batch_size + (0 if is_last else rollout.partial_prompts)
        groups = list(self._carried)
        drawn = self._order.draw(num_trained + len(groups), max(0, num_groups - len(groups)))
        # A prompt carried into the next epoch may be drawn again: the two groups then share one
        # mean, which is that of more samples of the same prompt.
        groups += [
            GroupRequest(self._prompts[index], str(iteration), rollout.num_generations)
            for index in drawn
        ]
        return self._run(
            groups,
            GroupSampling(rollout.temperature, 1.0, self._config.seed),
            what=f"rollout {iteration}",
            num_needed=train.train_batch_size,
        )

    def store(self, folder: Path) -> None:
        assert self._ahead is None, "finish_ahead before a checkpoint"
        ready, carried = self._ready, self._ready.carried if self._ready else self._carried
        if ready is None and not carried:
            return
        index = {
            "is_ready": ready is not None,
            "carried": [
                [g.prompt.prompt_id, g.tag, g.num_generations, len(g.begun)] for g in carried
            ],
        }
        if ready is not None:
            write_trajectories(folder / _READY, ready.trajectories)
        write_trajectories(folder / _CARRIED, [t for g in carried for t in g.begun])
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def restore(self, folder: Path) -> None:
        """Take over what `store` put there; without it the next rollout starts anew."""
        if not (folder / _INDEX).is_file():
            return
        index = json.loads((folder / _INDEX).read_text())
        begun = iter(read_trajectories(folder / _CARRIED))
        by_id = {prompt.prompt_id: prompt for prompt in self._prompts}
        self._carried = [
            GroupRequest(by_id[name], tag, count, tuple(next(begun) for _ in range(num_begun)))
            for name, tag, count, num_begun in index["carried"]
        ]
        if index["is_ready"]:
            trajectories = read_trajectories(folder / _READY)
            self._ready = RolloutResult(trajectories, self._carried)


class _Ahead:
    """A rollout in a thread of its own, which mostly waits for Ray."""

    def __init__(self, work: Callable[[], RolloutResult]):
        self._work = work
        self._result: RolloutResult | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="rollout-ahead", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # raised where the result is asked for
            self._error = error

    def result(self) -> RolloutResult:
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None, "a thread ends with a result or an error"
        return self._result
