"""Peak resident memory of a conversion: some blocks, whatever the size of tensors and shards.

Layer: one process per layout, files in a temporary folder. The full-size model:
megatron_sod/convert/benchmark.py. That blocks give the same numbers: test_tensor_source.py.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_sod.convert.benchmark import ROOT
from megatron_sod.convert.hf_files import write_hf_directory
from megatron_sod.convert.layout import hf_shapes
from megatron_sod.data.tiny_models import write_tiny_model
from megatron_sod.model.geometry import load_geometry
from tests.helpers.families import FAMILIES

# A first conversion, of a tiny model, leaves imports and allocator as the measured ones find them.
PROGRAM = """
import json, sys
from pathlib import Path
from megatron_sod.config.schema import ParallelConfig
from megatron_sod.convert.benchmark import PeakMemory
from megatron_sod.convert.to_hf import convert_megatron_to_hf
from megatron_sod.convert.to_megatron import convert_hf_to_megatron

folder, parallel = Path(sys.argv[1]), ParallelConfig(**json.loads(sys.argv[2]))
for name in ("tiny", "large"):
    with PeakMemory() as memory:
        convert_hf_to_megatron(
            folder / name, folder / f"{name}_m", parallel=parallel, max_shard_bytes=SHARD
        )
        convert_megatron_to_hf(folder / f"{name}_m", folder / f"{name}_hf", max_shard_bytes=SHARD)
print(json.dumps(memory.values()))
"""
SHARD = 95 * 10**6
VOCAB_SIZE, HIDDEN_SIZE = 120_011, 384  # 92 MB in bfloat16: nearly a shard, 5.5 blocks
LAYOUTS = {
    "qwen3": {},
    "qwen3_moe": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "sequence_parallel": True,
    },
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_peak_memory_is_below_two_shards_and_a_layer_and_below_the_largest_tensor(tmp_path, family):
    config = {**FAMILIES[family], "tie_word_embeddings": True}
    large = {**config, "vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE}
    _write_random_bits(tmp_path / "tiny", config)
    _write_random_bits(tmp_path / "large", large)
    memory = _convert_both_ways(tmp_path, LAYOUTS[family])
    shards = [path.stat().st_size for path in tmp_path.glob("large*/*.safetensors")]
    assert len(shards) == 4 and 92e6 < max(shards) < SHARD + 1e5
    shapes = hf_shapes(load_geometry(tmp_path / "large"))
    layer = 2 * sum(math.prod(s) for name, s in shapes.items() if ".layers.0." in name)
    assert memory["resident"] <= 2 * max(shards) + layer, memory  # what is promised
    assert memory["resident"] < 2 * VOCAB_SIZE * HIDDEN_SIZE, memory  # not even one tensor
    before, after = (
        json.loads((tmp_path / name / "parity.json").read_text())
        for name in ("large_m", "large_hf")
    )
    assert before["tensors"] == after["tensors"] and len(after["tensors"]) == len(shapes)


def _convert_both_ways(folder: Path, layout: dict) -> dict[str, int]:
    program = PROGRAM.replace("SHARD", str(SHARD))
    command = [sys.executable, "-c", program, str(folder), json.dumps(layout)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _write_random_bits(directory: Path, config: dict) -> None:
    """Two files of bfloat16: the embedding alone, and the layers."""
    write_tiny_model(directory, **config)
    shapes = hf_shapes(load_geometry(directory))
    contents = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    tensors = (
        (name, torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16))
        for name, shape in shapes.items()
    )
    embedding = 2 * math.prod(shapes["model.embed_tokens.weight"])
    write_hf_directory(directory, contents, tensors, directory, max_shard_bytes=embedding)
