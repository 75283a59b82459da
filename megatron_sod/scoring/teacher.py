"""A frozen model that serves the student's ranks, whatever its own parallel layout.

Its last stage's hidden states travel to the ranks that hold the student's logits, and a shard of
its head split like the student's is applied there: [R, H] moves, never [R, V].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sod.config.schema import ModelConfig
from megatron_sod.data.packing import without_rows
from megatron_sod.model.geometry import Geometry
from megatron_sod.model.gpt import PipelineModel
from megatron_sod.model.weights import load_head, load_model
from megatron_sod.parallel import state
from megatron_sod.parallel.context import whole_rows
from megatron_sod.parallel.cpu import device, to_host
from megatron_sod.parallel.residency import Residency
from megatron_sod.train.schedule import forward_only
from megatron_sod.types import MicroBatch


def open_teacher(
    section: ModelConfig,
    student: ModelConfig,
    geometry: Geometry,
    student_groups: ProcessGroupCollection,
    *,
    vocab_size: int,
) -> Teacher:
    """The teacher of a configuration: in the student's groups if its layout is the same, else in
    groups of its own. A collective over all ranks.

    Args:
        vocab_size: the student's. The teacher holds as many vocabulary rows, whatever its own
            number, so that both heads are cut at the same ids.
    """
    if section.parallel == student.parallel:
        model = load_model(section, geometry, student_groups, vocab_size=vocab_size)
        return Teacher(model, student_groups)
    groups, tp, head = state.further_groups(section.parallel), student_groups.tp, None
    with state.own_groups(groups):
        model = load_model(section, geometry, groups, vocab_size=vocab_size)
    if state.is_last_stage(student_groups):
        head = load_head(
            geometry,
            section.path,
            vocab_size=vocab_size,
            tp_rank=tp.rank(),
            tp_size=tp.size(),
            dtype=model.config.params_dtype,
        ).to(device())
    return Teacher(model, student_groups, head)


class Teacher:
    """`hidden_states` of micro-batches, and the head they belong to. Collectives over all ranks."""

    def __init__(
        self,
        model: PipelineModel,
        student_groups: ProcessGroupCollection,
        head_VpH: torch.Tensor | None = None,
    ):
        """
        Args:
            model: frozen; over the student's groups, or over its own.
            head_VpH: the output head split over the student's tensor-parallel ranks; needed on the
                student's last stage unless the model lives in the student's groups.
        """
        model.requires_grad_(False)
        model.eval()
        self.model, self._head = model, head_VpH
        self._student_groups = student_groups
        self._routes = None
        if model.pg_collection is not student_groups:
            self._routes = _Routes(student_groups, model.pg_collection)

    def head_weight(self) -> torch.Tensor:
        """[V / TP of the student, H], on the student's last stage."""
        return self.model.head_weight() if self._head is None else self._head

    def let_leave(self, residency: Residency) -> None:
        """Let its parameters, "teacher", leave the device while they are idle; the head that
        `head_weight` gives stays: the exact losses apply it in the update."""
        residency.may_leave("teacher", self._body)

    def _body(self) -> Iterator[torch.Tensor]:
        kept = None
        if self._head is None and state.is_last_stage(self._student_groups):
            kept = self.head_weight().untyped_storage()
        for parameter in self.model.parameters():
            if parameter.untyped_storage() is not kept:
                yield parameter

    def hidden_states(self, micro_batches: list[MicroBatch]) -> list[torch.Tensor]:
        """[R, H] for the rows of each of this rank's micro-batches, in host memory: those of an
        iteration may be tens of GB. Empty but on the student's last stage.

        `micro_batches` are those of this data-parallel rank of the student; every such rank brings
        equally many.
        """
        if self._routes is None:
            return self._forward(micro_batches)
        replicas: list = [None] * self._student_groups.dp.size()
        dist.all_gather_object(replicas, micro_batches, group=self._student_groups.dp)
        packs = [pack for replica in replicas for pack in replica]
        size, rank = self.model.pg_collection.dp.size(), self.model.pg_collection.dp.rank()
        mine = packs[rank::size]
        mine += [without_rows(packs[0])] * (-(-len(packs) // size) - len(mine))
        held = dict(zip(range(rank, len(packs), size), self._forward(mine), strict=False))
        return self._routes.deliver(
            [len(pack.rows) for pack in packs],
            held,
            width=self.model.config.hidden_size,
            dtype=self.model.config.params_dtype,
        )

    def _forward(self, micro_batches: list[MicroBatch]) -> list[torch.Tensor]:
        """Whole rows on every rank of the teacher's last stage."""
        cp_group = self.model.pg_collection.cp

        def rows_fn(hidden: torch.Tensor, batch: MicroBatch, number: int) -> torch.Tensor:
            rows = self.model.select_rows(hidden, batch.rows)
            rows = whole_rows(rows, batch.places, len(micro_batches[number].rows), cp_group)
            return to_host(rows)

        return forward_only(self.model, micro_batches, rows_fn)


@dataclass(frozen=True)
class _Place:
    """Where one global rank stands in one model."""

    is_last_stage: bool
    dp_rank: int


class _Routes:
    """Who sends the rows of which micro-batch to whom."""

    def __init__(self, student: ProcessGroupCollection, teacher: ProcessGroupCollection):
        mine = [_Place(state.is_last_stage(g), g.dp.rank()) for g in (student, teacher)]
        places: list = [None] * dist.get_world_size()
        dist.all_gather_object(places, mine)
        self._student: list[_Place] = [place[0] for place in places]
        self._teacher: list[_Place] = [place[1] for place in places]
        self._student_size, self._teacher_size = student.dp.size(), teacher.dp.size()

    def deliver(
        self, num_rows: list[int], held: dict[int, torch.Tensor], *, width: int, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """This rank's [R, H] from whoever holds them, in host memory on both sides.

        Args:
            num_rows: of every micro-batch, replica after replica of the student.
            held: number of a micro-batch -> its rows, on the teacher's last stage.
        """
        per_replica, rank = len(num_rows) // self._student_size, dist.get_rank()
        received = []
        for number, rows in enumerate(num_rows):
            transfers: list[dist.P2POp] = []
            buffer: torch.Tensor | None = None
            for source, target in self._pairs(number, number // per_replica):
                if source == target == rank:
                    received.append(held[number])
                elif target == rank:
                    buffer = torch.empty(rows, width, dtype=dtype, device=device())
                    transfers.append(dist.P2POp(dist.irecv, buffer, source))
                elif source == rank:
                    sent = held[number].to(device())
                    transfers.append(dist.P2POp(dist.isend, sent.contiguous(), target))
            if rows > 0 and transfers:
                for request in dist.batch_isend_irecv(transfers):
                    request.wait()
            if buffer is not None:
                received.append(to_host(buffer))
        return received

    def _pairs(self, number: int, replica: int) -> list[tuple[int, int]]:
        """(source, target) ranks of one micro-batch; a rank that holds the rows keeps them."""
        sources = _ranks(self._teacher, number % self._teacher_size)
        targets = _ranks(self._student, replica)
        return [
            (target if target in sources else sources[index % len(sources)], target)
            for index, target in enumerate(targets)
        ]


def _ranks(places: list[_Place], dp_rank: int) -> list[int]:
    """Ranks on the last stage of one replica."""
    return [
        rank
        for rank, place in enumerate(places)
        if place.is_last_stage and place.dp_rank == dp_rank
    ]
