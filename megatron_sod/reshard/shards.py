"""This trainer rank's live parameters as shards of Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_sod.convert.layout import Segment, segments_of
from megatron_sod.model.geometry import Geometry
from megatron_sod.model.gpt import PipelineModel
from megatron_sod.model.weights import split_of
from megatron_sod.reshard.layouts import TrainerLayout


def trainer_layout(model: PipelineModel) -> TrainerLayout:
    """The parallel layout the model was built with."""
    config, groups = model.config, model.pg_collection
    return TrainerLayout(
        world_size=dist.get_world_size(),
        num_layers=config.num_layers,
        tp_size=groups.tp.size(),
        pp_size=groups.pp.size(),
        num_chunks=len(model.chunks),
        ep_size=groups.ep.size(),
        expert_tp_size=groups.expt_tp.size(),
    )


def local_shards(
    model: PipelineModel, geometry: Geometry
) -> Iterator[tuple[Segment, torch.Tensor]]:
    """(segment, view of the parameter) of everything this rank holds, replicas included.

    Padding rows have no segment, and the copy of a tied embedding on the last stage is left out.
    """
    split = split_of(model.pg_collection)
    for name, parameter in model.global_parameters():
        if name == "output_layer.weight" and geometry.tied_embeddings:
            continue
        for segment in segments_of(name, geometry, **split):
            view = parameter.detach().narrow(segment.dim, segment.local_start, segment.length)
            yield segment, view
