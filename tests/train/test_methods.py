"""Every method trains with the real loop: scoring, credit, update, records, checkpoint, export.

Layers: two gloo ranks on recorded rollouts, all methods in one start; the default suite runs some,
the slow set all. With a real engine: tests/end_to_end. The arithmetic: tests/scoring.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_sod.config.methods import PRESETS
from megatron_sod.rollout.recording import Recording
from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import synthetic_trajectories, write_model_with_weights

NUM_ITERATIONS = 2
METHODS = {name: [f"method={name}"] for name in PRESETS}
VARIANTS = {
    "separate": ["distill.loss=sampled_separate"],
    "reverse_kl": ["distill.loss=reverse_kl"],
    "forward_kl": ["distill.loss=forward_kl"],
    "jsd": ["distill.loss=jsd"],
    "withdrawn": ["distill.withdraw={start_iteration: 1, end_iteration: 2}"],
    "withdrawn_exact": [
        "distill.loss=jsd",
        "distill.withdraw={start_iteration: 1, end_iteration: 2}",
    ],
    "d_floor": ["distill.step_weight.d_floor=0.9"],
    "exact_weights": ["distill.step_weight.source=reverse_kl"],
    "excluded": ["distill.exclude_token_ids=[" + ",".join(map(str, range(200))) + "]"],
    "ref_compat": ["ref_compat=true"],
    "spoilt": ["method=opd_naive", "name=spoilt"],
    "removed": ["method=opd_naive", "name=removed"],
    "not_finite": ["method=opd_naive", "name=not_finite"],
}
JOBS = METHODS | VARIANTS
QUICK = (
    "sod",
    "grpo",
    "opsd_hint",
    "d_floor",
    "withdrawn_exact",
    "spoilt",
    "removed",
    "not_finite",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Models, four prompts of which three have a hint, and rollouts on exactly these prompts."""
    folder = tmp_path_factory.mktemp("methods")
    write_model_with_weights(folder / "student", seed=1)
    write_model_with_weights(folder / "teacher", seed=2, num_hidden_layers=3)
    tasks = folder / "tasks.jsonl"
    rows = [{"prompt": f"Compute: 1{i} + 2", "answer": f"1{i + 2}"} for i in range(4)]
    for row in rows[:3]:
        row["hint"] = "add the ones first"
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("rollouts", "rollouts_removed"):
        for iteration in range(1, NUM_ITERATIONS + 1):
            found = synthetic_trajectories(4, 3, vocab_size=384, seed=iteration)
            found = [replace(t, prompt_id=f"{tasks}:{t.prompt_id[1:]}") for t in found]
            if name.endswith("removed"):
                found[0] = replace(found[0], finish_reason="infra_error", reward=float("nan"))
            Recording(folder / name).write(iteration, found)
    return folder


@pytest.fixture(scope="module")
def quick(inputs):
    return run_on_ranks(2, _train_all, str(inputs), {name: JOBS[name] for name in QUICK})[0]


@pytest.fixture(scope="module")
def everything(inputs):
    return run_on_ranks(2, _train_all, str(inputs), JOBS)[0]


def _check_trained(runs, name):
    rows, weights, initial = runs[name]
    assert [row["iteration"] for row in rows] == [1, 2]
    skipped = [1, 0] if name == "not_finite" else [0, 0]
    assert [row["actor/steps_skipped"] for row in rows] == skipped
    assert all(0 < row["actor/grad_norm"] < float("inf") for row in rows)
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert any(not torch.equal(weights[n], initial[n]) for n in initial)


@pytest.mark.dist
@pytest.mark.parametrize("name", QUICK)
def test_a_method_trains(quick, name):
    _check_trained(quick, name)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_every_method_and_option_trains(everything, name):
    _check_trained(everything, name)


@pytest.mark.dist
@pytest.mark.slow
def test_no_two_methods_compute_the_same(everything):
    ends = {n: torch.cat([w.flatten() for w in everything[n][1].values()]) for n in METHODS}
    same = {
        (a, b) for a in ends for b in ends if a < b and torch.allclose(ends[a], ends[b], atol=1e-7)
    }
    assert not same


@pytest.mark.dist
@pytest.mark.slow
def test_weights_follow_their_policy(everything):
    def first(name):
        return everything[name][0][0]

    for name in ("opd", "opd_naive", "opsd_gt"):
        assert first(name)["sod/w_min"] == 1.0 == first(name)["sod/w_p95"]
    assert first("sod")["sod/w_p95"] <= 1.2 + 1e-6 < first("sod_no_cap")["sod/w_p95"]
    assert first("sod_mask_after_wrong")["sod/w_min"] == 0.0
    assert 0.7 < first("sod_heuristic")["sod/w_min"] < 1.0
    assert first("d_floor")["sod/w_mean"] > first("sod")["sod/w_mean"]
    assert "sod/w_mean" not in first("grpo")


@pytest.mark.dist
def test_a_self_teacher_differs_from_the_student_by_what_it_is_told(quick):
    """Equal weights at iteration 1; without its own prompt every divergence would be 0."""
    rows = quick["opsd_hint"][0]
    assert rows[0]["sod/d_mean"] > 1e-3
    assert rows[0]["sod/untaught_trajectories"] == 2  # 3 of the prompt without a hint, 1 lost
    assert rows[0]["sod/w_mean"] == 1.0


@pytest.mark.dist
def test_a_withdrawn_teacher_is_not_asked_any_more(quick):
    first, second = quick["withdrawn_exact"][0]
    assert first["sod/w_mean"] > 0 and "sod/w_mean" not in second
    assert (first["sod/distill_coef"], second["sod/distill_coef"]) == (1.0, 0.0)


@pytest.mark.dist
def test_a_spoilt_trajectory_trains_nothing_and_counts_in_no_mean(quick):
    """One NaN of the teacher, against the same run without that trajectory."""
    rows, spoilt, _ = quick["spoilt"]
    removed_rows, removed, _ = quick["removed"]
    assert [row["sod/nonfinite_trajectories"] for row in rows] == [1, 1]
    for row, other in zip(rows, removed_rows, strict=True):
        assert row["actor/loss"] == pytest.approx(other["actor/loss"], rel=1e-4, abs=1e-6)
        assert row["actor/kl_k1"] == pytest.approx(other["actor/kl_k1"], rel=1e-3)
    for name, weight in spoilt.items():
        assert torch.allclose(weight, removed[name], atol=2e-5), name


def _train_all(folder: str, jobs: dict) -> dict:
    from safetensors.torch import load_file

    from megatron_sod import pipeline
    from megatron_sod.config.load import load_config
    from megatron_sod.parallel import state
    from megatron_sod.train.trainable import Trainable

    state.shutdown = state.parallel_state.destroy_model_parallel  # the next job goes on in here
    score, accumulate = pipeline.score, Trainable.accumulate
    found = {}
    initial = load_file(Path(folder) / "student" / "model.safetensors")
    for name, overrides in jobs.items():
        run_dir = Path(folder) / "runs" / name
        rollouts = "rollouts_removed" if name == "removed" else "rollouts"
        pipeline.score = _with_a_nan(score) if name == "spoilt" else score
        Trainable.accumulate = _once_infinite(accumulate) if name == "not_finite" else accumulate
        config = load_config("configs/demo_cpu.yaml", _arguments(folder, run_dir, rollouts)
                             + overrides)  # fmt: skip
        pipeline.train(config)
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
        found[name] = (rows, load_file(run_dir / "hf" / "model.safetensors"), initial)
    return found


def _once_infinite(accumulate):
    """The first gradient of the run has an infinity, on the last rank alone."""
    calls = []

    def spoilt(trainable, *args):
        collected = accumulate(trainable, *args)
        calls.append(1)
        if len(calls) == 1 and dist.get_rank() == dist.get_world_size() - 1:
            next(trainable.model.parameters()).main_grad.view(-1)[-1] = float("inf")
        return collected

    return spoilt


def _with_a_nan(score):
    """The teacher's logprob of one token of trajectory 0 (by prompt and length) is NaN."""

    def spoilt(student, teacher, micro_batches, **options):
        scores = score(student, teacher, micro_batches, **options)
        for batch, found in zip(micro_batches, scores, strict=True):
            starts = batch.cu_seqlens[:-1].tolist()
            marks = _first_tokens[0]
            for place, start in enumerate(starts):
                ids = batch.token_ids[0, start : int(batch.cu_seqlens[place + 1])].tolist()
                if ids in marks:
                    owned = (batch.rows >= start) & (batch.rows < start + len(ids))
                    found.teacher_logprobs[owned.nonzero()[0]] = float("nan")
        return scores

    _first_tokens[0] = [
        t.prompt_token_ids + t.response_token_ids
        for t in (
            synthetic_trajectories(4, 3, vocab_size=384, seed=i)[0]
            for i in range(1, NUM_ITERATIONS + 1)
        )
    ]
    return spoilt


_first_tokens: list = [[]]


def _arguments(folder: str, run_dir: Path, rollouts: str) -> list[str]:
    home = Path(folder)
    return [
        f"observe.run_dir={run_dir}",
        f"student.path={home / 'student'}",
        "student.parallel.tensor_model_parallel_size=1",
        "teacher.parallel.tensor_model_parallel_size=1",
        *([] if "opsd" in run_dir.name else [f"teacher.path={home / 'teacher'}"]),
        *([f"teacher.path={home / 'student'}"] if "opsd" in run_dir.name else []),
        f"rollout.replay={home / rollouts}",
        f"data.train=[{home / 'tasks.jsonl'}]",
        "data.eval=[]",
        "eval.teacher=false",
        "distill.loss=sampled_advantage",
        "distill.step_weight.epsilon=1e-6",
        f"train.num_iterations={NUM_ITERATIONS}",
        "train.train_batch_size=4",
        "train.ppo_mini_batch_size=2",
        "train.save_interval=10",
        "train.lr=1e-3",
        "train.lr_warmup_steps=0",
        "rollout.num_generations=3",
        "rollout.max_prompt_length=128",
        "watchdog.max_infra_error_rate=1.0",
    ]
