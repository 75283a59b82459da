"""Cold-start conversations -> sequences with their loss mask, under a length policy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_sod.data.chat import ChatFormat
from megatron_sod.data.packing import PackItem
from megatron_sod.errors import DataError
from megatron_sod.observe.progress import say


@dataclass(frozen=True)
class ColdStartData:
    """What is trained on, and what was not."""

    items: list[PackItem]
    num_cut: int  # shortened to max_length
    num_dropped: int  # longer than max_length
    num_without_loss: int  # no assistant token left

    @property
    def num_loss_tokens(self) -> int:
        return sum(sum(item.loss_mask) for item in self.items)


def cold_start_data(
    conversations: Iterable[list[dict]], chat: ChatFormat, *, max_length: int, overlong: str
) -> ColdStartData:
    """Every conversation as token ids with the loss on the assistant's; losses are counted, said.

    Args:
        overlong: "cut" keeps the first max_length tokens, "drop" leaves the conversation out,
            "error" refuses it.
    Raises:
        DataError: a conversation cannot be rendered, or is too long under "error".
    """
    items: list[PackItem] = []
    counts: Counter[str] = Counter()
    for number, messages in enumerate(conversations, 1):
        try:
            rendered = chat.conversation(messages)
        except DataError as error:
            raise DataError(f"conversation {number}: {error}") from error
        length = len(rendered.token_ids)
        if length > max_length and overlong == "error":
            raise DataError(
                f"conversation {number}: {length} tokens, more than data.max_length {max_length}; "
                "raise it, or set data.overlong to cut or drop"
            )
        if length > max_length:
            counts[overlong] += 1
            if overlong == "drop":
                continue
        item = PackItem(
            rendered.token_ids[:max_length],
            rendered.loss_mask[:max_length],
            rendered.step_ids[:max_length],
            [0.0] * min(length, max_length),
            len(items),
        )
        if any(item.loss_mask[1:]):
            items.append(item)
        else:
            counts["without_loss"] += 1
    found = ColdStartData(items, counts["cut"], counts["drop"], counts["without_loss"])
    say(
        f"data: {len(items)} conversations, {found.num_loss_tokens} tokens with loss; "
        f"{found.num_cut} cut and {found.num_dropped} dropped at {max_length} tokens, "
        f"{found.num_without_loss} without an assistant token left out"
    )
    return found
