"""A real engine without a controller, a real trainer model, and transformers as the oracle."""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path

import torch


def start_engine(
    path: str | Path, *, tp: int = 1, max_model_len: int = 128, vocab_size: int | None = None
):
    """An Engine actor with random weights, ready."""
    import ray

    from megatron_sod.rollout.engine import Engine, engine_environment
    from megatron_sod.rollout.ray_instance import start_ray

    start_ray()
    options = {
        "model": str(path),
        "dtype": "float32",
        "max_model_len": max_model_len,
        "max_num_seqs": 32,
        "tensor_parallel_size": tp,
        "gpu_memory_utilization": 0.5,
        "load_format": "dummy",
        "seed": 0,
        "transfer_backend": "auto",
        "vocab_size": vocab_size,
    }
    environment = {"env_vars": engine_environment(1)}
    actor = ray.remote(num_cpus=0, runtime_env=environment, max_concurrency=256)(Engine)
    engine = actor.remote(options)
    ray.get(engine.ready.remote(), timeout=300)
    return engine


def control_of(engine, *, tp: int = 1, pause: str = "wait", vocab_size: int | None = None):
    """What WeightSync asks of one engine."""
    import ray

    from megatron_sod.reshard.layouts import EngineLayout
    from megatron_sod.reshard.sync import EngineControl

    def ask(call):
        return ray.get(call, timeout=120)

    return EngineControl(
        layout=EngineLayout(tp, 1, vocab_size=vocab_size),
        hosts=lambda: [ask(engine.host.remote())],
        connect=lambda info: ask(engine.connect_weights.remote(info, 0)),
        update=lambda info, version: ask(engine.update_weights.remote(info, version, pause)),
        score=lambda rows: [[ask(engine.score.remote(ids)) for ids in rows]],
    )


def build_trainable(path: str | Path, parallel):
    """(trainable, geometry) with the directory's weights on this rank of the default group."""
    from megatron_sod.config.schema import TrainConfig
    from megatron_sod.model.build import build_model
    from megatron_sod.model.geometry import load_geometry
    from megatron_sod.model.weights import load_hf_weights
    from megatron_sod.parallel import state
    from megatron_sod.train.trainable import Trainable

    state.initialize(parallel, seed=0)
    geometry = load_geometry(path)
    model = build_model(geometry, parallel, state.process_groups())
    load_hf_weights(model, geometry, path)
    return Trainable(model, geometry, TrainConfig(num_iterations=1)), geometry


def change(model, *, seed: int) -> None:
    """Different weights, as after an optimizer step; the factor of a parameter does not depend on
    the rank, so replicated tensors stay replicated."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.split(".")[-2].replace("output_layer", "word_embeddings")  # may be tied
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{kind}".encode()))
            parameter.mul_(0.8 + 0.4 * torch.rand((), generator=generator))


class Oracle:
    """transformers on weights gathered from the trainer."""

    def __init__(self, path: str | Path):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(path)
        self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    def logprobs(self, tensors: dict[str, torch.Tensor], rows: list[list[int]]) -> torch.Tensor:
        """[sum of row lengths - 1] float32, of each token but the first of a row."""
        self._load(tensors)
        with torch.no_grad():
            logprobs = self._model(torch.tensor(rows)).logits.log_softmax(-1)[:, :-1]
        targets = torch.tensor(rows)[:, 1:, None]
        return logprobs.gather(2, targets).flatten()

    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            self._model.config.save_pretrained(folder)
            save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
            self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
