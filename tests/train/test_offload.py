"""Idle models wait in host memory, and nothing that is computed changes.

Layers: two gloo ranks, the real loop on recorded rollouts. What leaves on a GPU is what leaves
here: the storages are empty while they are away.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import replay
from tests.helpers.gloo import run_on_ranks

pytestmark = pytest.mark.dist
NUM_ITERATIONS = 2
ALL_OFF = [
    "train.param_offload=true",
    "train.optimizer_offload=true",
    "teacher.param_offload=true",
]
TP1 = [f"{model}.parallel.tensor_model_parallel_size=1" for model in ("student", "teacher")]
HALF = ["student.dtype=bfloat16", "teacher.dtype=bfloat16"]
LAYOUTS = {
    "dp2, exact loss": TP1,
    "dp2, bfloat16": TP1 + HALF,
    "tp2, bfloat16, whole optimizer, sampled loss": [
        *HALF,
        "train.use_distributed_optimizer=false",
        "distill.loss=sampled_advantage",
    ],
    "pp2, teacher tp2": [TP1[0], "student.parallel.pipeline_model_parallel_size=2"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    replay.write_inputs(folder, NUM_ITERATIONS)
    return run_on_ranks(2, _train_all, str(folder))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_run_is_bit_equal_to_one_that_offloads_nothing(runs, layout):
    for kept, moved in (rank[layout] for rank in runs):
        assert str(moved["rows"]) == str(kept["rows"])  # NaN is not equal to itself
        assert moved["weights"].keys() == kept["weights"].keys()
        assert all(torch.equal(moved["weights"][n], kept["weights"][n]) for n in kept["weights"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_phase_has_only_what_it_needs_on_the_device(runs, layout):
    """Bytes seen on entry of rollout, of the two scoring passes, and of the update."""
    for _, moved in (rank[layout] for rank in runs):
        seen = moved["seen"]
        rollout, teacher, student, update = (
            seen[phase] for phase in ("rollout", "teacher", "student", "update")
        )
        assert rollout["student"] == rollout["optimizer"] == rollout["gradients"] == 0
        assert teacher["student"] == teacher["optimizer"] == 0
        assert teacher["teacher"] > rollout["teacher"] == update["teacher"]
        assert student["teacher"] == rollout["teacher"]
        assert student["student"] == update["student"] > 0 == student["optimizer"]
        assert update["optimizer"] > 0
        assert update["gradients"] > 0


def _train_all(folder: str) -> dict:
    from megatron_sod.parallel import state

    state.shutdown = state.parallel_state.destroy_model_parallel  # the next run goes on in here
    return {
        layout: [_train(Path(folder), layout, more) for more in ([], ALL_OFF)] for layout in LAYOUTS
    }


def _train(folder: Path, layout: str, more: list[str]) -> dict:
    """Every metric that measures neither time nor machine, the weights, and the bytes on the device
    on entry of each phase of the last iteration."""
    import torch.distributed as dist

    from megatron_sod import pipeline
    from megatron_sod.config.load import load_config
    from megatron_sod.model.weights import gather_hf_tensors
    from megatron_sod.session import open_session

    run_dir = folder / f"{list(LAYOUTS).index(layout)}{'off' if more else ''}"
    given = replay.arguments(
        folder, run_dir, NUM_ITERATIONS, "train.save_interval=10", *LAYOUTS[layout], *more
    )
    rows, seen = [], {}
    with open_session(load_config(given[1], given[2:])) as session:
        with _watched(pipeline, session, seen):
            pipeline._begin(session)
            for _ in range(NUM_ITERATIONS):
                rows.append(pipeline.run_iteration(session))
        session.residency.hold("student")
        gathered = gather_hf_tensors(session.student.model, session.student.geometry)
        weights = {name: tensor.clone() for name, tensor in gathered}
    dist.barrier()
    machine = ("time/", "memory/", "gpu/")
    kept = [{k: v for k, v in row.items() if not k.startswith(machine)} for row in rows]
    return {"rows": kept, "weights": weights, "seen": seen}


class _watched:
    """Notes what is on the device when a phase begins its work."""

    def __init__(self, pipeline, session, seen: dict):
        self._pipeline, self._session, self._seen = pipeline, session, seen

    def __enter__(self) -> None:
        session, teacher = self._session, self._session.teacher
        self._plain = self._pipeline._roll_out, self._pipeline.update
        roll_out, update = self._plain
        self._pipeline._roll_out = self._noting("rollout", roll_out)
        self._pipeline.update = self._noting("update", update)
        teacher._forward = self._noting("teacher", teacher._forward)
        last = session.student.model
        last.output_logits = self._noting("student", last.output_logits, once=True)
        first = last.chunks[0]
        first.forward = self._noting("student", first.forward, once=True)

    def __exit__(self, *_) -> None:
        self._pipeline._roll_out, self._pipeline.update = self._plain

    def _noting(self, phase: str, work, *, once: bool = False):
        def noted(*args, **kwargs):
            if not once or phase not in self._seen:
                self._seen[phase] = _bytes(self._session)
            return work(*args, **kwargs)

        return noted


def _bytes(session) -> dict[str, int]:
    student = session.student
    tensors = {
        "student": student.model.parameters(),
        "teacher": session.teacher.model.parameters(),
        "optimizer": student._optimizer_tensors(),
        "gradients": student._gradients(),
    }
    return {name: sum(_sizes(found)) for name, found in tensors.items()}


def _sizes(tensors) -> list[int]:
    return [s.nbytes() for s in {t.untyped_storage() for t in tensors if t.numel() > 1}]
