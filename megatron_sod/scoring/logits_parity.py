"""Logits of the Megatron model against transformers, for the report of a conversion.

One process, float32, both models whole and one after the other.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sod.config.schema import ParallelConfig
from megatron_sod.convert.parity import Report
from megatron_sod.data.packing import PackItem, pack
from megatron_sod.data.tokenizer import load_tokenizer
from megatron_sod.errors import CheckpointError, DataError
from megatron_sod.model.build import build_model
from megatron_sod.model.geometry import load_geometry
from megatron_sod.model.weights import load_hf_weights
from megatron_sod.parallel import state
from megatron_sod.train.schedule import forward_only

TEXTS = (
    "The sum of 17 and 25 is 42, and 42 times 3 is 126.",
    "def area(width, height):\n    return width * height\n",
)
ALLOWED = 1e-3  # of the largest logit: float32 rounding stays far below it, a wrong layout does not


def check_logits(hf: str | Path, checkpoint: str | Path, texts: list[str]) -> dict[str, float]:
    """Largest absolute difference of all logits on `texts`, over the real vocabulary.

    Raises:
        CheckpointError: the difference is larger than rounding explains.
        DataError: no text has a token.
    """
    tokenizer = load_tokenizer(hf)
    sequences = [ids for text in texts if (ids := tokenizer.encode(text, add_special_tokens=False))]
    if not sequences:
        raise DataError("logits: no text to compare them on; give a file with one text per line")
    expected = _transformers_logits(hf, sequences)
    found = _megatron_logits(checkpoint, sequences)
    error, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not error <= ALLOWED * largest:  # also when it is no number
        raise CheckpointError(
            f"{checkpoint}: logits differ from transformers' on {hf} by up to {error:.3g} (largest "
            f"logit {largest:.3g}); the model computes something else: check config.json"
        )
    num_tokens = sum(map(len, sequences))
    return {"num_tokens": num_tokens, "max_abs_error": error, "largest_logit": largest}


def add_logits(
    report: Report, folder: str | Path, hf: str | Path, checkpoint: str | Path, texts: str
) -> None:
    """Compare logits and put the result into the report in `folder`.

    `texts`: a file with one text per line; empty: the built-in texts.
    """
    lines = [line for line in _lines(texts) if line.strip()] if texts else list(TEXTS)
    report.values["logits"] = check_logits(hf, checkpoint, lines)
    report.write(folder)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--check-logits {path}: cannot be read as text ({error})") from error


def _transformers_logits(hf: str | Path, sequences: list[list[int]]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0] for ids in sequences])


def _megatron_logits(checkpoint: str | Path, sequences: list[list[int]]) -> torch.Tensor:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel, geometry = ParallelConfig(), load_geometry(checkpoint)
    state.initialize(parallel, seed=0)
    try:
        model = build_model(geometry, parallel, state.process_groups())
        load_hf_weights(model, geometry, checkpoint)
        items = [PackItem(ids, [False] * len(ids), ids, [], 0) for ids in sequences]
        rows = torch.arange(sum(map(len, sequences)))
        [logits] = forward_only(
            model, [pack(items)], lambda hidden, _batch, _number: model.output_logits(hidden, rows)
        )
    finally:
        state.shutdown()
    return logits[:, : geometry.vocab_size].float().cpu()
