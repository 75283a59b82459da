"""Which interval of which tensor goes from which trainer rank to which engine rank, and when.

    segments of the trainer's ranks  x  segments of the engines' ranks  ->  copies, in rounds

Every decoder layer is cut alike, so one layer is planned and the others follow by renaming; copies
are generated when they are asked for. A round carries at most a bucket to each destination, and all
ranks walk the rounds in the same order: with at least one message buffered per pair of ranks no two
of them can wait for each other. Pure Python, deterministic, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_sod.convert.layout import Segment, hf_shapes, segments_of
from megatron_sod.model.geometry import Geometry
from megatron_sod.reshard.layouts import (
    LAYER,
    EngineLayout,
    EngineTensor,
    Holder,
    TrainerLayout,
    embedding_tensors,
    head_tensors,
    layer_tensors,
    megatron_layer_names,
)


class Copy(NamedTuple):
    """`length` indices along `dim` of one HF tensor, into one engine parameter.

    hf[start + i] -> tensor[expert][offset + i]; the sender finds its local place of hf[start]
    in its own segments (convert/layout.py).
    """

    hf_name: str
    dim: int
    start: int
    length: int
    width: int  # elements at each index: of 4096 rows and 128 columns, 4096 for dim 1
    tensor: str
    expert: int | None
    offset: int

    @property
    def num_elements(self) -> int:
        return self.length * self.width

    @property
    def shape(self) -> tuple[int, ...]:
        if self.width == 1:
            return (self.length,)
        return (self.length, self.width) if self.dim == 0 else (self.width, self.length)


class Message(NamedTuple):
    """What one trainer rank sends one destination in one round, packed in this order."""

    round: int
    source: int
    destination: int
    copies: list[Copy]

    @property
    def num_elements(self) -> int:
        return sum(copy.num_elements for copy in self.copies)


@dataclass(frozen=True)
class _Template:
    """Copies of one block into one engine rank, cut into rounds: [round][holder] -> copies."""

    rounds: list[dict[Holder, list[Copy]]]
    num_elements: int


class _Round(NamedTuple):
    """One round: which blocks, (template kind, round within it, pipeline stage, layer)."""

    parts: list[tuple[str, int, int, int]]


class ReshardPlan:
    """The whole transfer. `bucket_elements` bounds what one destination gets in one round."""

    def __init__(
        self,
        geometry: Geometry,
        trainer: TrainerLayout,
        engine: EngineLayout,
        *,
        bucket_elements: int,
    ):
        """
        Raises:
            ValueError: the trainer holds no source for a part of an engine's tensor.
        """
        self.geometry, self.trainer, self.engine = geometry, trainer, engine
        self.bucket_elements = bucket_elements
        self._widths = _block_widths(geometry)
        sources = {
            "embedding": _sources(["embedding.word_embeddings.weight"], geometry, trainer),
            "layer": _sources(megatron_layer_names(geometry, trainer.ep_size), geometry, trainer),
            "head": _sources(_head_names(geometry), geometry, trainer),
        }
        self._templates = {
            kind: [
                self._template(tensors(geometry, engine, rank), sources[kind])
                for rank in range(engine.tp_size)
            ]
            for kind, tensors in (
                ("embedding", embedding_tensors),
                ("layer", layer_tensors),
                ("head", head_tensors),
            )
        }
        self._users = {kind: _users(found) for kind, found in self._templates.items()}
        self.rounds = self._arrange()

    @property
    def num_rounds(self) -> int:
        return len(self.rounds)

    def engine_tensors(self, rank: int) -> Iterator[EngineTensor]:
        """Every parameter of engine rank `rank` this plan fills, in the engine's order."""
        yield from embedding_tensors(self.geometry, self.engine, rank)
        template = layer_tensors(self.geometry, self.engine, rank)
        for layer in range(self.geometry.num_layers):
            for tensor in template:
                parts = tuple(
                    (expert, replace(part, hf_name=_renamed(part.hf_name, layer)))
                    for expert, part in tensor.parts
                )
                yield EngineTensor(_renamed(tensor.name, layer), tensor.shape, parts)
        yield from head_tensors(self.geometry, self.engine, rank)

    def messages_to(self, destination: int) -> Iterator[Message]:
        """Everything engine worker `destination` receives, in order."""
        for number in range(self.num_rounds):
            by_source: dict[int, list[Copy]] = {}
            for source, copies, layer in self._pieces(number, destination):
                renamed = [_renamed_copy(copy, layer) for copy in copies]
                by_source.setdefault(source, []).extend(renamed)
            for source in sorted(by_source):
                yield Message(number, source, destination, by_source[source])

    def messages_from(self, source: int) -> Iterator[Message]:
        """Everything trainer rank `source` sends, in order."""
        for number in range(self.num_rounds):
            for destination in range(self.engine.num_destinations):
                copies = [
                    _renamed_copy(copy, layer)
                    for rank, group, layer in self._pieces(number, destination)
                    if rank == source
                    for copy in group
                ]
                if copies:
                    yield Message(number, source, destination, copies)

    def _pieces(self, number: int, destination: int) -> Iterator[tuple[int, list[Copy], int]]:
        """(source rank, copies as the template names them, layer) of one round."""
        engine, rank = divmod(destination, self.engine.tp_size)
        for kind, index, stage, layer in self.rounds[number].parts:
            template = self._templates[kind][rank]
            if index < len(template.rounds):
                for holder, copies in template.rounds[index].items():
                    users = self._users[kind][holder]
                    turn = engine * len(users) + users.index(rank) + layer
                    yield self.trainer.rank_of(holder, stage, turn), copies, layer

    def _template(self, tensors: list[EngineTensor], sources: dict[str, list]) -> _Template:
        copies = [
            piece
            for tensor in tensors
            for expert, segment in tensor.parts
            for piece in _intersect(tensor.name, expert, segment, sources, self._widths)
        ]
        rounds = _cut(copies, self.bucket_elements)
        return _Template(rounds, sum(copy.num_elements for _, copy in copies))

    def _arrange(self) -> list[_Round]:
        last = self.trainer.pp_size - 1
        layers = self.trainer.layer_order()
        largest = max(template.num_elements for template in self._templates["layer"])
        per_round = max(1, self.bucket_elements // largest)
        depth = {
            kind: max(len(template.rounds) for template in templates)
            for kind, templates in self._templates.items()
        }
        rounds = [_Round([("embedding", i, 0, 0)]) for i in range(depth["embedding"])]
        for first in range(0, len(layers), per_round):
            group = layers[first : first + per_round]
            rounds += [
                _Round([("layer", i, self.trainer.stage_of_layer(n), n) for n in group])
                for i in range(depth["layer"])
            ]
        return rounds + [_Round([("head", i, last, 0)]) for i in range(depth["head"])]


def _users(templates: list[_Template]) -> dict[Holder, list[int]]:
    """The engine ranks each holder serves: its copies share them out in turn."""
    users: dict[Holder, list[int]] = {}
    for rank, template in enumerate(templates):
        for holder in {holder for part in template.rounds for holder in part}:
            users.setdefault(holder, []).append(rank)
    return users


def _head_names(geometry: Geometry) -> list[str]:
    names = ["decoder.final_layernorm.weight"]
    return names if geometry.tied_embeddings else [*names, "output_layer.weight"]


def _block_widths(geometry: Geometry) -> dict[tuple[str, int], int]:
    """(tensor, dim) -> elements at one index along dim; layer 0 stands for all."""
    widths = {}
    for name, shape in hf_shapes(geometry).items():
        if name.startswith("model.layers.") and not name.startswith(LAYER):
            continue
        for dim in range(len(shape)):
            widths[name, dim] = shape[1 - dim] if len(shape) == 2 else 1
    return widths


def _sources(
    names: list[str], geometry: Geometry, trainer: TrainerLayout
) -> dict[str, list[tuple[Segment, Holder]]]:
    """HF tensor -> where its parts lie, in order of their start."""
    held: dict[str, list[tuple[Segment, Holder]]] = {}
    for name in names:
        for holder, split in trainer.holders(name):
            for segment in segments_of(name, geometry, **split):
                held.setdefault(segment.hf_name, []).append((segment, holder))
    for parts in held.values():
        parts.sort(key=lambda part: part[0].hf_start)
    return held


def _intersect(
    tensor: str, expert: int | None, wanted: Segment, sources: dict[str, list], widths: dict
) -> Iterator[tuple[Holder, Copy]]:
    """The copies that fill one segment of an engine's tensor, from whoever holds its parts."""
    covered, end = wanted.hf_start, wanted.hf_start + wanted.length
    for segment, holder in sources.get(wanted.hf_name, []):
        start = max(segment.hf_start, covered)
        stop = min(segment.hf_start + segment.length, end)
        if start >= stop:
            continue
        assert segment.dim == wanted.dim, f"{wanted.hf_name} is cut along different dimensions"
        if start > covered:
            break
        width = widths[wanted.hf_name, wanted.dim]
        offset = wanted.local_start + start - wanted.hf_start
        yield (
            holder,
            Copy(wanted.hf_name, wanted.dim, start, stop - start, width, tensor, expert, offset),
        )
        covered = stop
    if covered < end:
        raise ValueError(
            f"no trainer rank holds indices {covered} to {end} of {wanted.hf_name}, which the "
            f"engines need for {tensor}; the two sides were given different models"
        )


def _cut(copies: list[tuple[Holder, Copy]], bucket: int) -> list[dict[Holder, list[Copy]]]:
    """Rounds of at most `bucket` elements; a copy larger than what is left is split."""
    rounds: list[dict[Holder, list[Copy]]] = []
    room = 0
    for holder, copy in copies:
        done = 0
        while done < copy.length:
            if room < copy.width:
                rounds.append({})
                room = max(bucket, copy.width)
            length = min(copy.length - done, room // copy.width)
            part = copy._replace(start=copy.start + done, length=length, offset=copy.offset + done)
            rounds[-1].setdefault(holder, []).append(part)
            room -= part.num_elements
            done += length
    return rounds


def _renamed(name: str, layer: int) -> str:
    if name.startswith(LAYER):
        return f"model.layers.{layer}.{name[len(LAYER) :]}"
    return name


def _renamed_copy(copy: Copy, layer: int) -> Copy:
    return copy._replace(hf_name=_renamed(copy.hf_name, layer), tensor=_renamed(copy.tensor, layer))
