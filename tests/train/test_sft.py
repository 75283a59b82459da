"""Cold start: the loss is the mean over the assistant's tokens, however it is cut; runs resume.

Layers: pure (what the rules refuse), then gloo on one and two ranks with the real optimizer; the
oracle is transformers' own forward pass. Rendering: tests/data/test_chat.py; length policy:
tests/data/test_conversations.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_sod.config.load import load_sft_config
from megatron_sod.config.schema import SftConfig
from megatron_sod.errors import ConfigError
from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import write_model_with_weights

NUM, BATCH = 12, 6


def _config(model_dir: str, out: Path, *, micro=4096, train=None, **sections) -> SftConfig:
    return SftConfig.model_validate(
        {
            "student": {"path": model_dir, "dtype": "float32"},
            "data": {"conversations": [f"tiny_world:train:{NUM}"], "tools_in_prompt": False,
                     "max_length": min(512, micro)},
            "train": {"num_steps": 4, "global_batch_size": BATCH, "lr": 1e-3, "log_interval": 1,
                      "tokens_per_micro_batch": micro, "save_interval": 2, **(train or {})},
            "out": str(out),
            **sections,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("sft")
    return str(write_model_with_weights(folder / "model", seed=3))


@pytest.fixture(scope="module")
def runs(model_dir, tmp_path_factory):
    """name -> (logged rows, exported weights)."""
    folder = tmp_path_factory.mktemp("runs")
    one = {
        "whole": {},
        "split": {"micro": 300},
        "first_half": {"train": {"num_steps": 4}, "stop": 2},
        "resumed": {"home": "first_half"},
        "epochs": {"train": {"num_steps": None, "num_epochs": 2.0}},
    }
    return {
        **run_on_ranks(1, _train_all, model_dir, str(folder), one)[0],
        **run_on_ranks(2, _train_all, model_dir, str(folder), {"dp2": {"micro": 300}})[0],
    }


@pytest.mark.dist
def test_the_loss_is_transformers_mean_over_the_assistants_tokens(runs, model_dir):
    """Also where the reference errs: the target's mask decides, and the mean is over all tokens."""
    from transformers import AutoModelForCausalLM

    from megatron_sod.data.order import PromptOrder
    from megatron_sod.train.sft import _items

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    items = _items(_config(model_dir, Path("unused")))
    total, count = 0.0, 0
    for index in PromptOrder(NUM, 0).draw(0, BATCH):
        ids = torch.tensor([items[index].token_ids])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0], dim=-1)
        for at in range(1, ids.size(1)):
            if items[index].loss_mask[at]:
                total -= float(logprobs[at - 1, ids[0, at]])
                count += 1
    first = runs["whole"]["rows"][0]
    assert first["loss_tokens"] == count
    assert first["loss"] == pytest.approx(total / count, abs=1e-5)
    assert first["loss"] != pytest.approx(math.log(384), abs=1e-3)  # says more than ignorance


@pytest.mark.dist
@pytest.mark.parametrize("other", ["split", "dp2"])
def test_training_is_unchanged_by_micro_batches_and_data_parallel(runs, other):
    whole, cut = runs["whole"], runs[other]
    for row, same in zip(whole["rows"], cut["rows"], strict=True):
        assert row["loss"] == pytest.approx(same["loss"], abs=1e-6)
        assert row["grad_norm"] == pytest.approx(same["grad_norm"], rel=1e-4)
    for name, tensor in whole["weights"].items():
        assert torch.allclose(tensor, cut["weights"][name], atol=3e-5), name


@pytest.mark.dist
def test_a_run_cut_in_half_ends_with_the_weights_of_an_undisturbed_one(runs):
    whole, resumed = runs["whole"], runs["resumed"]
    assert [row["step"] for row in resumed["rows"]] == [1, 2, 3, 4]
    assert [r["loss"] for r in resumed["rows"]] == [r["loss"] for r in whole["rows"]]
    assert [r["lr"] for r in resumed["rows"]] == [r["lr"] for r in whole["rows"]]
    assert all(torch.equal(t, resumed["weights"][n]) for n, t in whole["weights"].items())


@pytest.mark.dist
def test_epochs_count_passes_over_the_data(runs):
    # 2 epochs x 12 conversations / 6 per step
    rows = runs["epochs"]["rows"]
    assert [row["epoch"] for row in rows] == [0.5, 1.0, 1.5, 2.0]
    assert [row["loss"] for row in rows] == [row["loss"] for row in runs["whole"]["rows"]]


@pytest.mark.dist
def test_the_rate_rises_and_falls_as_a_cosine(runs):
    # warm-up of int(.1 x 4) = 0 steps, then half a cosine over 4 steps
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert [row["lr"] for row in runs["whole"]["rows"]] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.num_steps=null"], "either train.num_steps or train.num_epochs"),
        (["train.num_epochs=1"], "either train.num_steps or train.num_epochs"),
        (["data.max_length=600"], "one conversation must fit"),
    ],
)
def test_contradictions_are_refused_before_anything_starts(tmp_path, overrides, expected):
    path = tmp_path / "sft.yaml"
    path.write_text(
        "student: {path: s}\ndata: {conversations: [x], max_length: 512}\nout: o\n"
        "train: {num_steps: 3, tokens_per_micro_batch: 512}\n"
    )
    with pytest.raises(ConfigError, match=expected):
        load_sft_config(path, overrides)


class _Stop(Exception): ...


def _train_all(model_dir: str, folder: str, jobs: dict) -> dict:
    from safetensors.torch import load_file

    from megatron_sod.parallel import state
    from megatron_sod.train import sft

    found = {}
    for name, job in jobs.items():
        job = dict(job)
        home, stop = Path(folder) / job.pop("home", name), job.pop("stop", None)
        config = _config(model_dir, home / "out", run_dir=str(home), **job)
        save = sft._Saver.save

        def save_and_stop(self, step, save=save, stop=stop):
            save(self, step)
            if step == stop:
                raise _Stop

        sft._Saver.save = save_and_stop
        try:
            sft.run_sft(config)
        except _Stop:
            pass
        sft._Saver.save = save
        state.parallel_state.destroy_model_parallel()
        rows = [json.loads(line) for line in (home / "metrics.jsonl").open()]
        weights = {}
        if stop is None:
            weights = load_file(home / "out" / "model.safetensors")
        found[name] = {"rows": rows, "weights": weights}
    return found
