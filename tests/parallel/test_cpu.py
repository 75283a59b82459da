"""Training on CPU asks nothing of Transformer-Engine or apex where they can be imported.

Layer: a process of its own, one gloo rank. The packages are stand-ins under which everything can be
imported and nothing can run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.families import FAMILIES
from tests.helpers.tiny import write_model_with_weights

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import contextlib, importlib, importlib.abc, importlib.machinery, sys

import torch

PACKAGES = {packages!r}

def unusable(*args, **options):
    raise AssertionError("a kernel for GPUs was called")

class Stand(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in PACKAGES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        module.__version__ = "2.9.0"
        module.__getattr__ = lambda name: usable(module.__name__, name)

def usable(module, name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name.startswith("multi_tensor"):
        return unusable
    if name == "get_cpu_offload_context":  # called without CUDA too; does nothing unless enabled
        return lambda *args, **options: (contextlib.nullcontext(), lambda tensor: tensor)
    if name[0].isupper():
        own = {{"__init__": unusable}} if name == "FusedAdam" else {{}}
        return type(name, (torch.nn.Module,), own)
    return importlib.import_module(module + "." + name)

sys.meta_path.insert(0, Stand())

import torch.distributed as dist
from megatron_sod.config.schema import ParallelConfig, TrainConfig
from megatron_sod.data.packing import PackItem, pack
from megatron_sod.model.build import build_model
from megatron_sod.model.geometry import load_geometry
from megatron_sod.model.weights import load_hf_weights
from megatron_sod.parallel import state
from megatron_sod.train.sft import _loss_fn
from megatron_sod.train.trainable import Trainable

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
batch = pack([PackItem([5, 17, 300, 380], [True] * 4, [1] * 4, [0.0] * 4, 0)])
for distributed in (True, False):
    state.initialize(ParallelConfig(), seed=0)
    geometry = load_geometry(sys.argv[1])
    model = build_model(geometry, ParallelConfig(), state.process_groups())
    load_hf_weights(model, geometry, sys.argv[1])
    train = TrainConfig(num_iterations=1, lr=1e-2, use_distributed_optimizer=distributed)
    loss_fn = _loss_fn(model, state.process_groups().tp)
    result = Trainable(model, geometry, train).step([batch], loss_fn)
    assert result.is_applied and result.grad_norm > 0
    state.parallel_state.destroy_model_parallel()
import {imported}
print("trained beside", {imported}.__version__)
"""


@pytest.mark.parametrize(
    "packages",
    [
        ("transformer_engine", "transformer_engine_torch"),
        pytest.param(("apex", "amp_C"), marks=pytest.mark.slow),
    ],
)
def test_a_step_on_cpu_uses_no_kernel_for_gpus(tmp_path, packages):
    settings = {**FAMILIES["qwen3_moe"], "vocab_size": 381}
    write_model_with_weights(tmp_path, seed=1, **settings)
    program = PROGRAM.format(packages=packages, imported=packages[0])
    found = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert "trained beside 2.9.0" in found.stdout
