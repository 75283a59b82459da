"""The student as vLLM's own engines take it: metadata and tensors agree, rank 0 alone holds them.

Layer: two gloo ranks. vLLM's nccl and ipc engines themselves need a GPU and are not run here.
"""

import pytest
import torch
import torch.distributed as dist

from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny import write_model_with_weights

pytest.importorskip("vllm", reason="the source implements vLLM's interface")

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


def test_source_declares_exactly_what_it_yields_and_needs_a_gpu_to_send(tmp_path):
    student = write_model_with_weights(tmp_path / "student", seed=1, tie_word_embeddings=False)
    main, other = run_on_ranks(2, _iterate, str(student))
    assert main["names"] == main["declared"] and "lm_head.weight" in main["names"]
    assert main["equal"] and main["num_bytes"] == main["file_bytes"]
    assert main["fewer_rows"] == {
        "model.embed_tokens.weight": (True, True),
        "lm_head.weight": (True, True),
    }, "engines that know fewer ids are told of and sent so many rows"
    assert other["names"] == [], "only rank 0 may hold whole tensors"
    assert "needs a GPU" in main["refused"]


def _iterate(path: str) -> dict:
    from safetensors.torch import load_file
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    from megatron_sod.config.schema import ParallelConfig
    from megatron_sod.errors import ConfigError
    from megatron_sod.reshard.vllm_source import MegatronSource, VllmSender
    from tests.reshard.real import build_trainable

    trainable, geometry = build_trainable(path, ParallelConfig(tensor_model_parallel_size=2))
    source = MegatronSource(trainable.model, geometry)
    meta, expected = source.metadata(), load_file(f"{path}/model.safetensors")
    pairs = iter(source)
    if dist.get_rank() == 0:  # vLLM's own check of a source, as its sender runs it
        pairs = NCCLTrainerWeightTransferEngine._checked_iter(source, meta)
    found = dict(pairs)
    fewer = MegatronSource(trainable.model, geometry, vocab_size=300)
    shapes = {m.name: m.shape for m in fewer.metadata()}
    fewer_rows = {
        name: (shapes[name] == tuple(tensor.shape), torch.equal(tensor, expected[name][:300]))
        for name, tensor in fewer
        if len(tensor) == 300
    }
    try:
        VllmSender("vllm_nccl", source, None, num_workers=1)
        refused = ""
    except ConfigError as error:
        refused = str(error)
    return {
        "fewer_rows": fewer_rows,
        "declared": [m.name for m in meta],
        "names": list(found),
        "equal": all(torch.equal(found[n], expected[n]) for n in found),
        "num_bytes": source.num_bytes,
        "file_bytes": sum(t.nbytes for t in expected.values()),
        "refused": refused,
    }
