"""Everything a run holds between iterations, opened in order and closed in reverse."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sod.config.load import config_hash
from megatron_sod.config.schema import SodConfig
from megatron_sod.data.order import PromptOrder
from megatron_sod.inputs import Inputs
from megatron_sod.model.geometry import Geometry
from megatron_sod.model.weights import load_model
from megatron_sod.observe import terminal
from megatron_sod.observe.live_view import TrainingView
from megatron_sod.observe.loggers import Logger, open_loggers
from megatron_sod.observe.progress import say
from megatron_sod.observe.run_dir import RunDir, versions
from megatron_sod.observe.telemetry import Telemetry
from megatron_sod.observe.watchdog import Watchdog
from megatron_sod.parallel import state
from megatron_sod.parallel.lifetime import StopRequest, die_with_parent
from megatron_sod.parallel.residency import Residency
from megatron_sod.parallel.watch import Watch
from megatron_sod.reshard.canary import canary_sequences, trainer_logprobs
from megatron_sod.reshard.sync import WeightSync
from megatron_sod.rollout.recording import Recording
from megatron_sod.rollout.source import LiveRollouts, RecordedRollouts, Rollouts
from megatron_sod.rollout.start import start_engines, wait_before_models, wait_until_ready
from megatron_sod.scoring.teacher import Teacher, open_teacher
from megatron_sod.train.checkpoint import Checkpoints, Description, Progress
from megatron_sod.train.trainable import Trainable
from megatron_sod.types import Prompt

if TYPE_CHECKING:
    from megatron_sod.rollout.controller import RolloutController


@dataclass
class Session:
    """One trainer rank's view of the run. `controller` lives on rank 0 only."""

    config: SodConfig
    groups: ProcessGroupCollection
    student: Trainable
    teacher: Teacher | None
    residency: Residency
    prompts: list[Prompt]
    teacher_prompts: dict[str, list[int]] | None  # what a privileged teacher reads
    eval_prompts: list[Prompt]
    run_dir: RunDir
    checkpoints: Checkpoints
    stop: StopRequest
    progress: Progress
    tokenizer: Any
    sync: WeightSync | None  # None in a replay: there are no engines
    telemetry: Telemetry
    rollouts: Rollouts | None = None  # on rank 0
    loggers: list[Logger] = field(default_factory=list)  # on rank 0
    controller: RolloutController | None = None
    teacher_controller: RolloutController | None = None
    watchdog: Watchdog | None = None  # rank 0, once it has been asked
    last_save_s: float = 0.0  # how long the newest save held training up
    view: TrainingView = field(default_factory=TrainingView)

    @property
    def is_main(self) -> bool:
        return dist.get_rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return state.is_last_stage(self.groups)

    @property
    def makes_records(self) -> bool:
        """One rank per data-parallel replica holds the scores that are reported."""
        groups = self.groups
        return self.is_last_stage and groups.tp.rank() == 0 and groups.cp.rank() == 0

    def save(self) -> None:
        """Begin a checkpoint of the present state. A collective over all trainer ranks."""
        self.residency.hold("student", "optimizer")
        store = self.rollouts.store if self.rollouts else None
        self.checkpoints.save(self.student, self.progress, store)

    def load(self, path: str | Path) -> Progress:
        """Fill the student from a checkpoint. A collective over all trainer ranks."""
        self.residency.hold("student", "optimizer")
        return self.checkpoints.load(self.student, path)


@contextlib.contextmanager
def open_session(config: SodConfig) -> Iterator[Session]:
    """Check the inputs, start every process, load models and the latest checkpoint."""
    torch.manual_seed(config.seed)
    with contextlib.ExitStack() as closing:
        inputs = Inputs(config)  # before anything is started
        # Longer than what ends a stuck run with a message: NCCL's own timeout kills the rank.
        timeout_s = int(max(config.observe.stall_timeout_s, config.transfer.timeout_s)) + 300
        state.initialize(config.student.parallel, seed=config.seed, timeout_s=timeout_s)
        closing.push(state.shutdown_unless_failed)
        groups = state.process_groups()
        run_dir = RunDir(config)
        watch, stop = _watched(config, run_dir, closing)
        telemetry = Telemetry(config.observe.telemetry_interval_s)
        closing.callback(telemetry.close)
        described = Description(config.model_dump(mode="json"), versions(), config.student.path)
        checkpoints = Checkpoints(
            run_dir.checkpoints, keep_last=config.train.keep_last, description=described
        )
        closing.callback(checkpoints.close)
        resume_from = _resume_from(config, checkpoints)
        loggers = _open_folder(config, run_dir, closing, is_fresh=resume_from is None)
        controller, teacher_controller = _start_engines(
            config, inputs, run_dir, watch, stop, closing
        )
        wait_before_models(config, controller, teacher_controller)
        residency = Residency()
        student, teacher = _open_models(config, inputs, groups, residency)
        wait_until_ready(config, controller)
        sync = None
        residency.hold("student")
        if config.rollout.replay is None:
            sync = _weight_sync(config, student, inputs.student, controller)
            closing.callback(sync.close)
        session = Session(
            config=config,
            groups=groups,
            student=student,
            teacher=teacher,
            residency=residency,
            prompts=inputs.prompts,
            teacher_prompts=inputs.teacher_prompts,
            eval_prompts=inputs.eval_prompts,
            run_dir=run_dir,
            checkpoints=checkpoints,
            stop=stop,
            progress=Progress(0, 0, 0, 0, config_hash(config)),
            tokenizer=inputs.tokenizer,
            sync=sync,
            telemetry=telemetry,
            rollouts=_rollouts(config, inputs, run_dir, controller, resume_from),
            loggers=loggers,
            controller=controller,
            teacher_controller=teacher_controller,
        )
        if resume_from is not None:
            session.progress = session.load(resume_from)
            for line in checkpoints.changes_since(resume_from):
                say(f"since the checkpoint: {line}")
        stop.install()
        closing.callback(stop.uninstall)
        closing.enter_context(watch.running())
        yield session


def _start_engines(
    config: SodConfig,
    inputs: Inputs,
    run_dir: RunDir,
    watch: Watch,
    stop: StopRequest,
    closing: contextlib.ExitStack,
) -> tuple[RolloutController | None, RolloutController | None]:
    """On rank 0 the student's engines, and the teacher's if it is to be evaluated; they start
    meanwhile. A collective."""
    machines = state.machines(config.cluster.gpus_per_node)
    if dist.get_rank() != 0 or config.rollout.replay is not None:
        return None, None
    from megatron_sod.rollout.ray_instance import log_folder, stop_ray  # a replay needs no Ray

    closing.callback(stop_ray)
    closing.callback(lambda: terminal.keep_worker_logs(Path(log_folder()), run_dir.logs))
    watch.on_abort.append(stop_ray)
    stop.on_stop_now.append(stop_ray)
    evals = [row for row in run_dir.rows("evals.jsonl") if row["model"] == "teacher"]
    is_done = any(row["success"] is not None for row in evals)
    student, teacher = start_engines(
        config,
        vocab_size=inputs.vocab_size,
        machines=machines,
        with_teacher=config.eval.teacher and not is_done,
    )
    closing.callback(student.close)
    return student, teacher


def _open_models(
    config: SodConfig, inputs: Inputs, groups: ProcessGroupCollection, residency: Residency
) -> tuple[Trainable, Teacher | None]:
    """Student and teacher with their weights, each moved off before the next comes if asked."""
    model = load_model(config.student, inputs.student, groups)
    model.real_vocab_size = inputs.vocab_size
    student, teacher = Trainable(model, inputs.student, config.train), None
    student.let_leave(
        residency,
        parameters=config.train.param_offload,
        optimizer=config.train.optimizer_offload,
    )
    residency.hold()
    if config.teacher is not None and inputs.teacher is not None and config.distill.coef > 0:
        rows = inputs.student.vocab_size
        teacher = open_teacher(
            config.teacher, config.student, inputs.teacher, groups, vocab_size=rows
        )
        if config.teacher.param_offload:
            teacher.let_leave(residency)
            residency.hold()
    return student, teacher


def _open_folder(
    config: SodConfig, run_dir: RunDir, closing: contextlib.ExitStack, *, is_fresh: bool
) -> list[Logger]:
    """Make the run's folder its own; loggers on rank 0, a log file on the others."""
    loggers: list[Logger] = []
    if dist.get_rank() == 0:
        if is_fresh:
            run_dir.move_previous_aside()
        run_dir.prepare(config)
        loggers += open_loggers(config, run_dir.path)
        for logger in loggers:
            closing.callback(logger.close)
    dist.barrier()  # the folder is the new run's own
    run_dir.check_shared()
    closing.enter_context(terminal.others_into(run_dir.logs / f"rank_{dist.get_rank()}.log"))
    return loggers


def _watched(
    config: SodConfig, run_dir: RunDir, closing: contextlib.ExitStack
) -> tuple[Watch, StopRequest]:
    """Let no rank hang or outlive the others unnoticed."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    watch = Watch(
        run_dir.path, stall_timeout_s=config.observe.stall_timeout_s, say=terminal.last_word
    )
    closing.callback(watch.close)
    return watch, StopRequest(run_dir.path / "stop", say=terminal.last_word)


def _resume_from(config: SodConfig, checkpoints: Checkpoints) -> str | Path | None:
    """The checkpoint folder `train.resume` names; None for a fresh start."""
    if config.train.resume == "never":
        return None
    return checkpoints.latest() if config.train.resume == "auto" else config.train.resume


def _rollouts(
    config: SodConfig,
    inputs: Inputs,
    run_dir: RunDir,
    controller: RolloutController | None,
    resume_from: str | Path | None,
) -> Rollouts | None:
    """Rank 0's source of trajectories, with what the checkpoint holds of them."""
    if dist.get_rank() != 0:
        return None
    if config.rollout.replay is not None:
        return RecordedRollouts(Recording(config.rollout.replay))
    assert controller is not None, "rank 0 has a controller unless it replays"
    rollouts = LiveRollouts(
        controller.run,
        inputs.prompts,
        PromptOrder(len(inputs.prompts), config.seed, config.data.shuffle),
        config,
        Recording(run_dir.rollouts) if config.rollout.record else None,
    )
    if resume_from is not None:
        rollouts.restore(Path(resume_from))
    return rollouts


def _weight_sync(
    config: SodConfig,
    student: Trainable,
    geometry: Geometry,
    controller: RolloutController | None,
) -> WeightSync:
    canaries = canary_sequences(student.model.real_vocab_size, config.transfer.num_canary_tokens)
    return WeightSync(
        student.model,
        geometry,
        controller.engine_control() if controller else None,
        canaries=canaries,
        is_colocated=config.rollout.placement == "colocated",
        trainer_logprobs=lambda sequences: trainer_logprobs(student.model, sequences),
        config=config.transfer,
    )
