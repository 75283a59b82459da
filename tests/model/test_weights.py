"""Gradients leave the model as they are stored. Weights in every layout: test_build.

Layer: two gloo ranks.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers.families import FAMILIES
from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import write_model_with_weights

LAYOUTS = ({"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2})


@pytest.mark.dist
def test_gradients_of_a_bfloat16_model_arrive_in_float32(tmp_path):
    """A third is no bfloat16: 0.33333334 would arrive as 0.33398438, if it arrived at all."""
    write_model_with_weights(tmp_path, seed=1, **{**FAMILIES["qwen3"], "vocab_size": 381})
    for found in run_on_ranks(2, _gathered, str(tmp_path))[0]:
        assert len(found) > 40
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32, name
            assert (gradient == torch.tensor(1 / 3)).all(), name


def _gathered(model_dir: str) -> list[dict[str, torch.Tensor]]:
    from megatron_sod.config.schema import ParallelConfig, TrainConfig
    from megatron_sod.model.build import build_model
    from megatron_sod.model.geometry import load_geometry
    from megatron_sod.model.weights import gather_hf_tensors, main_grad
    from megatron_sod.parallel import state
    from megatron_sod.train.trainable import Trainable

    found = []
    for layout in LAYOUTS:
        parallel, geometry = ParallelConfig(**layout), load_geometry(model_dir)
        state.initialize(parallel, seed=0)
        model = build_model(geometry, parallel, state.process_groups(), dtype="bfloat16")
        trainable = Trainable(model, geometry, TrainConfig(num_iterations=1))
        for chunk in trainable.ddp_chunks:
            for buffer in chunk.buffers:
                buffer.grad_data.fill_(1 / 3)
        gradients = gather_hf_tensors(model, geometry, value_of=main_grad)
        found.append({name: tensor.clone() for name, tensor in gradients})
        state.release_groups()
    return found
