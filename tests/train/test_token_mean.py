"""The mean over tokens is one mean, whatever is cut where.

Ten tokens of loss +1 and a thousand of loss -1 give (10 - 1000) / 1010 = -0.980198. A mean per
micro-batch or rank, averaged over samples, gives 0 (the reference's arithmetic).

Layers: gloo on one and two ranks, with the real model, loss and finaliser; in float64.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import sod_config, write_model_with_weights

EXPECTED = (10 - 1000) / 1010
SPLITS = {
    "one": (1, 5000),
    "two micro-batches": (1, 1010),
    "dp2": (2, 5000),
    "dp2 split": (2, 1010),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mean")
    model = str(write_model_with_weights(folder / "m", seed=1, dtype=torch.float64))
    found = {}
    for ranks in (1, 2):
        jobs = {name: tokens for name, (n, tokens) in SPLITS.items() if n == ranks}
        found |= run_on_ranks(ranks, _losses, model, jobs)[0]
    return found


@pytest.mark.dist
@pytest.mark.parametrize("split", SPLITS)
def test_a_long_and_a_short_sample_weigh_by_their_tokens(measured, split):
    loss, _, grad = measured[split]
    assert loss == pytest.approx(EXPECTED, abs=1e-12)
    assert loss == pytest.approx(-0.980198, abs=1e-6)
    assert grad == pytest.approx(measured["one"][2], rel=1e-9)


@pytest.mark.dist
def test_the_splits_really_differ_and_a_mean_of_means_would_be_zero(measured):
    assert measured["one"][1] == [(-990.0, 1010.0)]
    for name in ("two micro-batches", "dp2"):
        parts = sorted(part for part in measured[name][1] if part[1])
        assert parts == [(-1000.0, 1000.0), (10.0, 10.0)]
        assert sum(total / count for total, count in parts) / 2 == 0.0


def _losses(model_dir: str, jobs: dict) -> dict:
    from megatron_sod.data.packing import PackItem, pack, plan_micro_batches
    from megatron_sod.model.build import build_model
    from megatron_sod.model.geometry import load_geometry
    from megatron_sod.model.weights import load_hf_weights
    from megatron_sod.parallel import state
    from megatron_sod.scoring.score import score
    from megatron_sod.train.loss import make_loss_fn
    from megatron_sod.train.trainable import Trainable
    from megatron_sod.types import TokenCredit

    train = {"num_iterations": 1, "use_distributed_optimizer": False}
    config = sod_config(model_dir, model_dir, method="grpo", distill={"coef": 0.0}, train=train)
    state.initialize(config.student.parallel, seed=0)
    groups = state.process_groups()
    geometry = load_geometry(model_dir)
    model = build_model(geometry, config.student.parallel, groups, dtype="float64")
    load_hf_weights(model, geometry, model_dir)
    student = Trainable(model, geometry, config.train)
    items = [
        PackItem([5 + i % 300 for i in range(n + 1)], [False] + [True] * n, [0] + [1] * n,
                 [0.0] * (n + 1), index)
        for index, n in enumerate((10, 1000))
    ]  # fmt: skip
    found = {}
    for name, tokens in jobs.items():
        plan = plan_micro_batches([len(i.token_ids) for i in items], dp_size=groups.dp.size(),
                                  tokens_per_micro_batch=tokens)[groups.dp.rank()]  # fmt: skip
        batches = [pack([items[i] for i in indices]) for indices in plan]
        scores = score(model, None, batches, temperature=1.0)
        credits = []
        for batch, s in zip(batches, scores, strict=True):
            # loss at ratio 1 is -A: +1 on the short sample, -1 on the long one
            advantages = torch.where(batch.trajectory_ids == 0, -1.0, 1.0).double()
            none = torch.zeros_like(advantages)
            credits.append(TokenCredit(s.student_logprobs, advantages, none, none, none + 1))
        collected = student.accumulate(batches, make_loss_fn(model, None, credits, scores, config))
        local = [(float(c["loss"]), float(c["rows"])) for c in collected]
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, local)
        parts = [part for rank in everyone for part in rank]
        total, count = (sum(column) for column in zip(*parts, strict=True))
        grad = sum(float(p.main_grad.double().square().sum()) for p in model.parameters()) ** 0.5
        found[name] = (total / count, parts, grad)
    state.parallel_state.destroy_model_parallel()
    return found
