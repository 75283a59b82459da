"""Time and memory of both conversions of a full-size model, against transformers load and save.

python -m megatron_sod.convert.benchmark [--model configs/models/qwen3-0.6b.yaml] [--out FILE]

The model has random bfloat16 weights. Every step runs in a process of its own, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_sod.config.schema import ParallelConfig
from megatron_sod.convert.hf_files import write_hf_directory
from megatron_sod.convert.layout import hf_shapes
from megatron_sod.convert.output import num_bytes
from megatron_sod.model.geometry import Geometry, load_geometry

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {
    "TP1": ParallelConfig(),
    "TP4 PP2": ParallelConfig(tensor_model_parallel_size=4, pipeline_model_parallel_size=2),
}
DIRECTIONS = ("HF to Megatron", "Megatron to HF")
STEPS = [f"{direction}, {layout}" for layout in LAYOUTS for direction in DIRECTIONS]
STEPS += ["transformers, load and save"]


def measure(model: Path, shard_size: str, rounds: int, folder: Path) -> tuple[dict, list[dict]]:
    """({facts}, one row per step) of `rounds` turns over all steps."""
    source = folder / "source"
    write_random_model(model, source, num_bytes(shard_size))
    results: dict[str, list[dict]] = {step: [] for step in STEPS}
    for _ in range(rounds):
        for step in STEPS:
            results[step].append(_in_a_process(step, folder, shard_size))
        for path in folder.iterdir():
            if path != source:
                shutil.rmtree(path)
    geometry = load_geometry(source)
    files = [path.stat().st_size for path in source.glob("*.safetensors")]
    layer = 2 * sum(
        torch.Size(shape).numel()
        for name, shape in hf_shapes(geometry).items()
        if name.startswith("model.layers.0.")
    )
    largest = 2 * max(torch.Size(shape).numel() for shape in hf_shapes(geometry).values())
    facts = {
        "model bytes": sum(files),
        "source shards": len(files),
        "largest shard": max(files),
        "one layer": layer,
        "largest tensor": largest,
        "two shards and one layer": 2 * max(files) + layer,
    }
    return facts, [_row(step, runs) for step, runs in results.items()]


def _row(step: str, runs: list[dict]) -> dict:
    row = {key: statistics.median(run[key] for run in runs) for key in ("wall_s", "first_half_s")}
    row |= {key: max(run[key] for run in runs) for key in ("resident", "anonymous")}
    return {"step": step, "slowest_s": max(run["wall_s"] for run in runs), **row}


def write_random_model(model: Path, out: Path, shard_bytes: int) -> None:
    """A model directory with the geometry of a configs/models file, bfloat16, made in one pass."""
    from omegaconf import OmegaConf

    out.mkdir(parents=True)
    config = OmegaConf.to_container(OmegaConf.load(model))
    assert isinstance(config, dict), f"{model} is not a mapping"
    family = config["architectures"][0].removesuffix("ForCausalLM")
    model_type = {"Qwen3": "qwen3", "Qwen3Moe": "qwen3_moe", "Qwen2": "qwen2", "Llama": "llama"}
    config |= {"model_type": model_type[family], "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    geometry = load_geometry(out)
    contents = {name: (torch.bfloat16, shape) for name, shape in hf_shapes(geometry).items()}
    tensors = _random_tensors(geometry)
    write_hf_directory(out, contents, tensors, out, max_shard_bytes=shard_bytes)


def _random_tensors(geometry: Geometry) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in hf_shapes(geometry).items():
        yield name, (torch.randn(shape, generator=generator) * 0.02).bfloat16()


def _in_a_process(step: str, folder: Path, shard_size: str) -> dict:
    command = [sys.executable, "-m", "megatron_sod.convert.benchmark", "--step", step]
    command += ["--folder", str(folder), "--max-shard-size", shard_size]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_step(step: str, folder: Path, shard_size: str) -> dict:
    """Do one step here and say what it cost; memory beyond what the imports took."""
    halfway: list[float] = []

    def note(done: int, total: int) -> None:
        if 2 * done >= total and not halfway:
            halfway.append(time.perf_counter())  # all written; comparing begins

    kind, layout = step.split(", ")
    if kind == "transformers":
        from transformers import AutoModelForCausalLM
    else:
        from megatron_sod.convert.to_hf import convert_megatron_to_hf
        from megatron_sod.convert.to_megatron import convert_hf_to_megatron
    size, source = num_bytes(shard_size), folder / "source"
    with PeakMemory() as memory:
        start = time.perf_counter()
        if kind == "HF to Megatron":
            parallel, out = LAYOUTS[layout], folder / layout
            convert_hf_to_megatron(
                source, out, parallel=parallel, max_shard_bytes=size, on_progress=note
            )
        elif kind == "Megatron to HF":
            out = folder / f"HF of {layout}"
            convert_megatron_to_hf(folder / layout, out, max_shard_bytes=size, on_progress=note)
        else:
            model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
            halfway.append(time.perf_counter())
            model.save_pretrained(folder / "saved", max_shard_size=shard_size)
        end = time.perf_counter()
    return {"wall_s": end - start, "first_half_s": halfway[0] - start, **memory.values()}


class PeakMemory:
    """Peak resident memory while it is open, less what was resident before, in bytes.

    `anonymous` leaves out mapped file pages, which the kernel takes back when memory is short.
    """

    def __enter__(self) -> PeakMemory:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present
        self._before, self._peak = _status(), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, _status()["RssAnon"])

    def __exit__(self, *_exception) -> None:
        self._stop.set()
        self._thread.join()
        self._after = _status()

    def values(self) -> dict[str, int]:
        return {
            "baseline": self._before["VmRSS"],
            "resident": self._after["VmHWM"] - self._before["VmRSS"],
            "anonymous": self._peak - self._before["RssAnon"],
        }


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {key: int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM", "RssAnon")}


def report(model: Path, rounds: int, tables: dict[str, tuple[dict, list[dict]]]) -> str:
    """The page as Markdown."""
    parts = [
        "# Conversion: time and memory",
        f"Made by `python -m megatron_sod.convert.benchmark --rounds {rounds} --out "
        f"docs/benchmarks/conversion.md` for {model.stem} with random bfloat16 weights on "
        f"{os.cpu_count()} CPUs, {platform.machine()}; load average at the end "
        f"{os.getloadavg()[0]:.1f}. Median times and largest memory of {rounds} rounds, each step "
        "in a process of its own, in turns, files in the page cache. Memory is the peak beyond "
        "what the imports took: resident (VmHWM) counts everything, mapped files too; anonymous "
        "leaves those out. The bound on resident memory is two shards and one layer. A conversion "
        "reads its result again and compares every bit; `first half` is writing for a conversion "
        "and loading for transformers.",
    ]
    for size, (facts, rows) in tables.items():
        facts_line = ", ".join(
            f"{name} {value if name == 'source shards' else f'{value / 1e6:.0f} MB'}"
            for name, value in facts.items()
        )
        base = next(row["wall_s"] for row in rows if row["step"] == STEPS[-1])
        bound = facts["two shards and one layer"]
        lines = [
            "| step | s | slowest, s | first half, s | against transformers | resident, MB | "
            "anonymous, MB | resident / bound |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['step']} | {row['wall_s']:.1f} | {row['slowest_s']:.1f} | "
            f"{row['first_half_s']:.1f} | {row['wall_s'] / base:.2f} | "
            f"{row['resident'] / 1e6:.0f} | {row['anonymous'] / 1e6:.0f} | "
            f"{row['resident'] / bound:.2f} |"
            for row in rows
        ]
        parts += [f"## Shards of at most {size}", facts_line + ".", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", default="configs/models/qwen3-0.6b.yaml")
    parser.add_argument("--out", help="also write the page to this file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-shard-size", default="5GB,400MB", help="sizes to measure with")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="where the models are written; default: a temporary one")
    arguments = parser.parse_args()
    if arguments.step:
        print(
            json.dumps(run_step(arguments.step, Path(arguments.folder), arguments.max_shard_size))
        )
        return
    model, tables = ROOT / arguments.model, {}
    for size in arguments.max_shard_size.split(","):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            tables[size] = measure(model, size, arguments.rounds, Path(folder))
    page = report(model, arguments.rounds, tables)
    print(page)
    if arguments.out:
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.out).write_text(page)


if __name__ == "__main__":
    main()
