"""The order in which prompts are drawn: a function of seed and position, so a run can resume."""

from __future__ import annotations

import random
from dataclasses import dataclass

from megatron_sod.errors import DataError


@dataclass(frozen=True)
class PromptOrder:
    """An endless sequence of prompt indices; each epoch is one permutation."""

    num_prompts: int
    seed: int
    shuffle: bool = True

    def draw(self, position: int, count: int) -> list[int]:
        """Indices of draws position..position + count - 1, all different within one call.

        Raises:
            DataError: `count` exceeds the number of prompts.
        """
        if count > self.num_prompts:
            raise DataError(
                f"train.train_batch_size {count} exceeds the {self.num_prompts} usable prompts; "
                "lower it or add data"
            )
        epoch, offset = divmod(position, self.num_prompts)
        first = self._epoch(epoch)
        drawn = first[offset : offset + count]
        if len(drawn) < count:
            drawn += self._epoch(epoch + 1)[: count - len(drawn)]
        met = set(drawn)
        if len(met) < count:  # the batch spans two epochs and met a prompt twice
            spare = (i for i in first if i not in met)
            seen: set[int] = set()
            for place, index in enumerate(drawn):
                drawn[place] = next(spare) if index in seen else index
                seen.add(drawn[place])
        return drawn

    def _epoch(self, epoch: int) -> list[int]:
        indices = list(range(self.num_prompts))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(indices)
        return indices
