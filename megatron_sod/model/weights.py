"""Moving weights between a Megatron model spread over ranks and Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sod.config.schema import ModelConfig
from megatron_sod.convert.hf_files import HfTensors, write_hf_directory
from megatron_sod.convert.layout import Segment, hf_shapes, segments_of, sharding_of
from megatron_sod.convert.megatron_files import (
    MegatronSource,
    MegatronTensors,
    is_megatron_checkpoint,
)
from megatron_sod.convert.tensor_source import TensorSource, fill_local, row_blocks
from megatron_sod.errors import ModelError
from megatron_sod.model.build import build_model
from megatron_sod.model.geometry import Geometry
from megatron_sod.model.gpt import PipelineModel


def split_of(groups: ProcessGroupCollection) -> dict[str, int]:
    """This rank's place in the model, as `segments_of` takes it."""
    return {
        "tp_rank": groups.tp.rank(),
        "tp_size": groups.tp.size(),
        "ep_rank": groups.ep.rank(),
        "ep_size": groups.ep.size(),
        "expert_tp_rank": groups.expt_tp.rank(),
        "expert_tp_size": groups.expt_tp.size(),
    }


def has_weights(model_dir: str | Path) -> bool:
    """Whether the directory holds weights, or only a configuration to be initialised."""
    return any(Path(model_dir).glob("*.safetensors")) or is_megatron_checkpoint(model_dir)


def load_model(
    section: ModelConfig,
    geometry: Geometry,
    groups: ProcessGroupCollection,
    *,
    vocab_size: int | None = None,
) -> PipelineModel:
    """This rank's part of the model a configuration section describes, with its weights; randomly
    initialised where the directory holds none.

    Args:
        geometry: of the model directory.
        vocab_size: vocabulary rows to hold instead of its own: further ones are left out, missing
            ones are zero.
    """
    held = geometry if vocab_size is None else replace(geometry, vocab_size=vocab_size)
    model = build_model(
        held, section.parallel, groups, dtype=section.dtype, recompute=section.recompute
    )
    if has_weights(section.path):
        load_hf_weights(model, held, section.path, stored=geometry)
    return model


def load_hf_weights(
    model: PipelineModel,
    geometry: Geometry,
    model_dir: str | Path,
    *,
    stored: Geometry | None = None,
) -> None:
    """Fill this rank's parameters from a model directory.

    The directory holds safetensors or a Megatron distributed checkpoint of any layout; only this
    rank's slices are read, in blocks. Padded vocabulary rows are set to zero.

    Args:
        stored: the directory's geometry, where its vocab_size is another than the model's.
    Raises:
        ModelError: a tensor is missing or has another shape than the geometry says.
        CheckpointError: the same of a distributed checkpoint.
    """
    source, split = _Source(stored or geometry, model_dir), split_of(model.pg_collection)
    for name, parameter in model.global_parameters():
        source.fill(parameter, segments_of(name, geometry, **split))


def load_head(
    geometry: Geometry,
    model_dir: str | Path,
    *,
    vocab_size: int,
    tp_rank: int,
    tp_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[V / TP, H] one shard of the output head alone, on the host; padded rows are zero.

    Args:
        geometry, vocab_size: as in `load_model`.
    Raises: as `load_hf_weights`.
    """
    held = replace(geometry, vocab_size=vocab_size)
    rows = held.padded_vocab_size(tp_size) // tp_size
    head = torch.empty(rows, held.hidden_size, dtype=dtype)
    segments = segments_of("output_layer.weight", held, tp_rank=tp_rank, tp_size=tp_size)
    _Source(geometry, model_dir).fill(head, segments)
    return head


class _Source:
    """The HF tensors of a model directory, copied block by block."""

    def __init__(self, geometry: Geometry, model_dir: str | Path):
        self._tensors: TensorSource
        if is_megatron_checkpoint(model_dir):
            self._tensors = MegatronSource(MegatronTensors(model_dir), geometry)
        else:
            self._tensors = HfTensors(model_dir)
        self._shapes, self._model_dir = hf_shapes(geometry), model_dir

    @torch.no_grad()
    def fill(self, parameter: torch.Tensor, segments: list[Segment]) -> None:
        held = []
        for segment in segments:
            self._check_shape(segment.hf_name)
            # Only a vocabulary can be shorter than what the model holds of it.
            length = self._shapes[segment.hf_name][segment.dim] - segment.hf_start
            held.append(replace(segment, length=min(segment.length, length)))
        for first, length in row_blocks(parameter.shape):
            start = (first,) + (0,) * (parameter.dim() - 1)
            fill_local(parameter[first : first + length], start, held, self._tensors)

    def _check_shape(self, name: str) -> None:
        found, expected = self._tensors.shape(name), self._shapes[name]
        if found != expected:
            raise ModelError(
                f"{self._model_dir}: tensor {name} has shape {found}, config.json says {expected}; "
                "weights and configuration belong to different models"
            )


ValueOf = Callable[[torch.nn.Parameter], torch.Tensor]


def _weight(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter


def main_grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The accumulated gradient, for `gather_hf_tensors(..., value_of=main_grad)`."""
    return parameter.main_grad  # type: ignore[attr-defined]  # Megatron's DDP sets it


def owned_segments(
    model: PipelineModel, geometry: Geometry, value_of: ValueOf = _weight
) -> Iterator[tuple[Segment, torch.Tensor]]:
    """(segment, view of the local parameter) this rank is the one owner of, in model order.

    Replicated parameters are owned by TP rank 0, tied heads by the first stage; of the ranks that
    hold equal copies for other data, rank 0 owns them.
    """
    groups: ProcessGroupCollection = model.pg_collection
    split = split_of(groups)
    for name, parameter in model.global_parameters():
        if name == "output_layer.weight" and geometry.tied_embeddings:
            continue
        sharding = sharding_of(name)
        copies = groups.expt_dp if sharding == "expert" else groups.dp_cp
        if copies.rank() != 0 or (sharding == "replicated" and groups.tp.rank() != 0):
            continue
        for segment in segments_of(name, geometry, **split):
            view = (
                value_of(parameter)
                .detach()
                .narrow(segment.dim, segment.local_start, segment.length)
            )
            yield segment, view


def gather_hf_tensors(
    model: PipelineModel, geometry: Geometry, value_of: ValueOf = _weight
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every HF tensor (or the gradient in its shape), assembled on global rank 0, one at a time.

    Nothing on other ranks. A collective: all ranks must iterate to the end.
    """
    mine: dict[str, list[tuple[Segment, torch.Tensor]]] = {}
    for segment, view in owned_segments(model, geometry, value_of):
        mine.setdefault(segment.hf_name, []).append((segment, view))
    owners: list[dict[str, list[Segment]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(owners, {name: [s for s, _ in pairs] for name, pairs in mine.items()})
    rank = dist.get_rank()
    dtype = value_of(next(model.parameters())).dtype  # gradients may be wider than their parameters
    for hf_name, shape in hf_shapes(geometry).items():
        if rank != 0:
            for _, view in mine.get(hf_name, []):
                dist.send(view.contiguous(), 0)
            continue
        whole = torch.empty(shape, dtype=dtype, device=_device_of(model))
        for source, held in enumerate(owners):
            for index, segment in enumerate(held.get(hf_name, [])):
                target = whole.narrow(segment.dim, segment.hf_start, segment.length)
                if source == 0:
                    target.copy_(mine[hf_name][index][1])
                else:
                    received = torch.empty_like(target, memory_format=torch.contiguous_format)
                    dist.recv(received, source)
                    target.copy_(received)
        yield hf_name, whole


def _device_of(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def export_hf(
    model: PipelineModel, geometry: Geometry, out_dir: str | Path, side_files_from: str | Path
) -> None:
    """Write the model as a Hugging Face directory (rank 0 writes). A collective."""
    tensors = ((name, tensor.cpu()) for name, tensor in gather_hf_tensors(model, geometry))
    if dist.get_rank() == 0:
        dtype = model.config.params_dtype
        contents = {name: (dtype, shape) for name, shape in hf_shapes(geometry).items()}
        write_hf_directory(out_dir, contents, tensors, side_files_from)
    else:
        for _ in tensors:
            pass
    dist.barrier()
