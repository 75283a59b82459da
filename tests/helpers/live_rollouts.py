"""A real controller with the demo's student, and what tests ask of the rollouts it makes.

Ray, vLLM engines that get their weights by transfer as in training, agent loops; programs go to a
SandboxFusion service of our own that fails on demand.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ray
import torch
from safetensors.torch import load_file

from megatron_sod.config.schema import SodConfig
from megatron_sod.convert.layout import Segment
from megatron_sod.data.sources import load_prompts
from megatron_sod.model.geometry import load_geometry
from megatron_sod.reshard.layouts import TrainerLayout
from megatron_sod.reshard.send import ShardSender, index_shards
from megatron_sod.reshard.setup import TransferSetup
from megatron_sod.rollout.controller import RolloutController
from megatron_sod.rollout.groups import GroupRequest, RolloutResult
from megatron_sod.rollout.ray_instance import stop_ray
from megatron_sod.rollout.tool_calls import ToolCallParser
from megatron_sod.rollout.worker import GroupSampling
from megatron_sod.types import Prompt, Trajectory
from tests.helpers.flaky_service import FlakyService
from tests.helpers.tiny import sod_config

STUDENT = Path(__file__).resolve().parents[2] / "configs/demo/student"
GROUP, OBSERVATION_LENGTH, VERSION = 4, 32, 7
SAMPLING = GroupSampling(temperature=1.0, top_p=1.0, seed=5)
_BUSY_TIMEOUT_S = 300


def rollout_config(service_url: str | None, **rollout) -> SodConfig:
    """Twelve prompts of the demo's world, groups of four. Without a service: the local sandbox."""
    sandbox: dict = {"kind": "sandbox_fusion", "url": [service_url], "max_infra_retries": 0}
    if service_url is None:
        sandbox = {"kind": "local", "timeout_s": 10, "max_infra_retries": 5}
    engine = {"max_num_seqs": 32, "start_timeout_s": 600, **rollout.pop("engine", {})}
    settings = {
        "num_generations": GROUP,
        "max_turns": 6,
        "max_prompt_length": 64,
        "max_response_length": 224,
        "max_observation_length": OBSERVATION_LENGTH,
        "timeout_s": 600,
        "max_in_flight": 24,
        "max_restarts": 2,
        **rollout,
    }
    return sod_config(
        STUDENT,
        STUDENT,
        data={"train": ["tiny_world:train:12"], "tools_in_prompt": False},
        rollout={**settings, "engine": engine},
        sandbox=sandbox,
    )


@contextlib.contextmanager
def serving_controller(config: SodConfig, folder: Path) -> Iterator[RolloutController]:
    """Its engines start with random weights and get the student's by transfer."""
    controller = RolloutController(config, config.student, load_weights=False)
    try:
        controller.wait_until_ready("test engines")
        control = controller.engine_control()
        setup = _setup(control, folder)
        sender = _send_student(setup)
        control.connect({"setup": setup.as_dict()})
        control.update({"policy_version": VERSION, "transfer": 0}, VERSION)
        control.score([[1, 2, 3, 4, 5, 6]])
        yield controller
        controller.close()
        sender.close()
    finally:
        stop_ray()


def _setup(control, folder: Path) -> TransferSetup:
    geometry = load_geometry(STUDENT)
    return TransferSetup(
        geometry,
        TrainerLayout(1, geometry.num_layers),
        control.layout,
        dtype="float32",
        bucket_bytes=1 << 20,
        backend="shared_memory",
        timeout_s=60,
        is_kept=True,
        folder=str(folder),
    )


def _send_student(setup: TransferSetup) -> ShardSender:
    """What one trainer rank that holds everything would do."""
    tensors = load_file(STUDENT / "model.safetensors")
    shards = [(Segment(n, 0, 0, 0, t.shape[0]), t.float()) for n, t in tensors.items()]
    sender = ShardSender(setup, 0, index_shards(shards), torch.device("cpu"))
    sender.send()
    return sender


def load_all_prompts(config: SodConfig, chat) -> list[Prompt]:
    keys = {"prompt_key": "prompt", "answer_key": "answer"}
    return load_prompts(config.data.train, chat, max_length=64, **keys)


@dataclass(frozen=True)
class Observed(RolloutResult):
    """A rollout with the incidents since the one before."""

    counts: Counter[str] = field(default_factory=Counter)


def roll_out(controller, prompts, sampling=SAMPLING, **options) -> Observed:
    groups = [GroupRequest(prompt, "1", GROUP) for prompt in prompts]
    result = controller.run(groups, sampling, what="test rollout", **options)
    return Observed(**vars(result), counts=controller.take_counts())


def roll_out_disturbed(
    controller, prompts, service: FlakyService, disturb: Callable[[], None]
) -> Observed:
    """A rollout with `disturb` called in its middle: when the first trajectory calls its tool and
    others still sample. No tool answers before it, so that the rollout cannot be over."""
    begun, disturbed = threading.Event(), threading.Event()

    def hold(code):
        begun.set()
        disturbed.wait(_BUSY_TIMEOUT_S)

    def work():
        if begun.wait(_BUSY_TIMEOUT_S):
            disturb()
            disturbed.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    service.fault = hold
    result = roll_out(controller, prompts)
    thread.join(_BUSY_TIMEOUT_S)
    assert disturbed.is_set(), "the rollout was over before the disturbance"
    return result


def num_sampling(controller, engine: int) -> int:
    """Requests an engine has not answered."""
    actor = controller.fleet.engines[engine]
    return ray.get(
        actor.__ray_call__.remote(lambda self: len(self._llm.output_processor.request_states))
    )


def wait_until(condition: Callable[[], bool], otherwise: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def check_accounts(trajectories: list[Trajectory], prompts: list[Prompt]) -> None:
    """Every trajectory asked for is there once, in order."""
    expected = [f"{p.prompt_id}/1/{sample}" for p in prompts for sample in range(GROUP)]
    assert [t.trajectory_id for t in trajectories] == expected


def codes_of(trajectory: Trajectory, chat) -> set[str]:
    """Programs the trajectory asked for."""
    parser, codes = ToolCallParser(chat.tokenizer), set()
    for step in trajectory.steps:
        pairs = zip(trajectory.response_token_ids, trajectory.step_ids, strict=True)
        calls = parser.parse([token for token, at in pairs if at == step.step_id])
        codes |= {c.arguments["code"] for c in calls if isinstance(c.arguments.get("code"), str)}
    return codes


def contexts_of(trajectory: Trajectory) -> list[list[int]]:
    """Runs of tokens the student did not write."""
    runs: list[list[int]] = []
    before = True
    pairs = zip(trajectory.response_token_ids, trajectory.loss_mask, strict=True)
    for token, mine in pairs:
        if not mine:
            runs = [*runs, [token]] if before else [*runs[:-1], [*runs[-1], token]]
        before = mine
    return runs
