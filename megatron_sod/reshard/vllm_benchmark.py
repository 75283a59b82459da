"""Our transfer beside gathering whole tensors and beside saving a checkpoint, in one run.

    python -m megatron_sod.reshard.vllm_benchmark [--preset 0.6b|tiny] [--ranks 2]
        [--engine-tp 1] [--rounds 3] [--out FILE.json]

Trainer ranks (tensor parallel) and one vLLM engine on this machine; the three ways alternate within
each round, so that load on the machine falls on all of them. Extra memory is the peak of a process
above its resting state, pages of shared memory it touched included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sod.reshard.memory import peak_mb, reset_peak

PRESETS: dict[str, dict[str, Any]] = {
    "0.6b": {
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "torch_dtype": "bfloat16",
    },
    "tiny": {"torch_dtype": "bfloat16"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="0.6b")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engine-tp", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        _rank(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        _write_model(Path(folder) / "model", arguments.preset)
        rows = _run_ranks(arguments, folder)
    print(_table(rows))
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=2) + "\n")


def _write_model(directory: Path, preset: str) -> None:
    """config.json and random bfloat16 weights, which trainer and engine start from."""
    import torch
    from safetensors.torch import save_file

    from megatron_sod.convert.layout import hf_shapes
    from megatron_sod.data.tiny_models import write_tiny_model
    from megatron_sod.model.geometry import load_geometry

    sizes = PRESETS[preset]
    write_tiny_model(directory, **{k: v for k, v in sizes.items() if k != "vocab_size"})
    config = json.loads((directory / "config.json").read_text()) | sizes
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        for name, shape in hf_shapes(load_geometry(directory)).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _run_ranks(arguments, folder: str) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(arguments.ranks), "-m", "megatron_sod.reshard.vllm_benchmark"),
        *("--rank", "0", "--folder", folder, "--preset", arguments.preset),
        *("--engine-tp", str(arguments.engine_tp), "--rounds", str(arguments.rounds)),
    ]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads((Path(folder) / "result.json").read_text())


def _rank(arguments) -> None:
    """One trainer rank; rank 0 also drives the engine."""
    import torch.distributed as dist

    from megatron_sod.config.schema import ParallelConfig, TransferConfig
    from megatron_sod.model.build import build_model
    from megatron_sod.model.geometry import load_geometry
    from megatron_sod.model.weights import load_hf_weights
    from megatron_sod.parallel import state
    from megatron_sod.reshard.sync import WeightSync
    from megatron_sod.reshard.vllm_process import EngineProcess

    path = Path(arguments.folder) / "model"
    parallel = ParallelConfig(tensor_model_parallel_size=int(os.environ["WORLD_SIZE"]))
    state.initialize(parallel, seed=0)
    geometry = load_geometry(path)
    model = build_model(geometry, parallel, state.process_groups(), dtype="bfloat16")
    load_hf_weights(model, geometry, path)
    is_main = dist.get_rank() == 0
    engine = EngineProcess(path, tp=arguments.engine_tp, dtype="bfloat16") if is_main else None
    sync = WeightSync(
        model,
        geometry,
        engine.control() if engine else None,
        config=TransferConfig(canary_interval=10**6, canary_tolerance=1e9, keep_sent=False),
        canaries=[[1, 2, 3]],
        trainer_logprobs=lambda rows: [[0.0] * (len(row) - 1) for row in rows],
    )
    versions = iter(range(10**6))
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: sync.transfer(next(versions)).num_bytes,
        "gather": lambda: _reload(model, geometry, engine, path, "/dev/shm"),
        "checkpoint": lambda: _reload(model, geometry, engine, path, arguments.folder),
    }
    rows = _measure(ways, engine, arguments.rounds)
    if engine is not None:
        (Path(arguments.folder) / "result.json").write_text(json.dumps(rows))
        engine.close()
    sync.close()
    state.shutdown()


def _reload(model, geometry, engine, path: Path, base: str) -> int:
    """Whole tensors on rank 0, a file (in memory, or on disk), and vLLM's own load_weights."""
    import torch.distributed as dist

    from megatron_sod.model.weights import export_hf

    holder = [tempfile.mkdtemp(dir=base) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(holder, src=0)
    export_hf(model, geometry, holder[0], path)
    size = sum(f.stat().st_size for f in Path(holder[0]).glob("*.safetensors"))
    dist.barrier()
    if engine is not None:
        engine.call("reload", holder[0])
        shutil.rmtree(holder[0])
    dist.barrier()
    return size


def _measure(ways: dict[str, Callable], engine, rounds: int) -> dict[str, Any]:
    """Wall seconds, extra megabytes of each trainer rank and of the engine, bytes handed over."""
    import torch.distributed as dist

    rows: dict[str, Any] = {}
    for name in ways:
        rows[name] = {"walls_s": [], "rank_mb": [], "engine_mb": [], "bytes": ways[name]()}
    for _ in range(rounds):
        for name, way in ways.items():
            engine_rest = engine.call("reset_peak") if engine else 0.0
            dist.barrier()
            rest, started = reset_peak(), time.monotonic()
            way()
            rows[name]["walls_s"].append(time.monotonic() - started)
            peaks: list[float] = [0.0] * dist.get_world_size()
            dist.all_gather_object(peaks, peak_mb() - rest)
            rows[name]["rank_mb"].append(peaks)
            rows[name]["engine_mb"].append(engine.call("peak_mb") - engine_rest if engine else 0)
    return rows


def _table(rows: dict[str, Any]) -> str:
    ours = statistics.median(rows["ours"]["walls_s"])
    lines = [
        "| way | median s | ratio | extra MB per trainer rank | extra MB engine | bytes |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        wall = statistics.median(row["walls_s"])
        ranks = [max(column) for column in zip(*row["rank_mb"], strict=True)]
        lines.append(
            f"| {name} | {wall:.2f} | {wall / ours:.2f} | "
            f"{', '.join(f'{mb:.0f}' for mb in ranks)} | {max(row['engine_mb']):.0f} | "
            f"{row['bytes']:,} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
