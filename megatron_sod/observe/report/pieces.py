"""Token ids -> the text each token shows, as indices into a table without repeats."""

from __future__ import annotations

from typing import Any

import numpy as np

_HALF = "\ufffd"  # what decoding leaves of a character whose bytes are spread over tokens
_LONGEST_CHARACTER = 8  # tokens one character (or joined emoji) may be spread over


class Pieces:
    """Grows its table while sequences are added."""

    def __init__(self, tokenizer: Any):
        """`tokenizer` None shows the ids themselves."""
        self._tokenizer = tokenizer
        self.table: list[str] = []
        self._index: dict[str, int] = {}
        self._of_id: dict[int, int] = {}
        self._joined: dict[tuple[int, ...], str] = {}

    def add(self, ids: list[int]) -> np.ndarray:
        """[len(ids)] uint32 into `table`; a character spread over tokens stands on its first."""
        distinct, place = np.unique(np.array(ids, np.int64), return_inverse=True)
        pieces = np.array([self._piece_of(int(id)) for id in distinct], np.uint32)
        found = pieces[place] if len(ids) else np.zeros(0, np.uint32)
        is_half = np.array([_HALF in self.table[piece] for piece in pieces], bool)
        done = 0
        for at in np.flatnonzero(is_half[place]) if is_half.any() else ():
            if at >= done:
                text, count = self._join(tuple(ids[at : at + _LONGEST_CHARACTER]))
                found[at] = self._place(text)
                found[at + 1 : at + count] = self._place("")
                done = at + count
        return found

    def _join(self, ids: tuple[int, ...]) -> tuple[str, int]:
        """The shortest prefix of `ids` that decodes to whole characters, else the first alone."""
        for count in range(2, len(ids) + 1):
            text = self._decode(ids[:count])
            if _HALF not in text:
                return text, count
        return self.table[self._piece_of(ids[0])], 1

    def _decode(self, ids: tuple[int, ...]) -> str:
        if ids not in self._joined:
            self._joined[ids] = self._tokenizer.decode(list(ids))
        return self._joined[ids]

    def _piece_of(self, id: int) -> int:
        if id not in self._of_id:
            self._of_id[id] = self._place(self._text(id))
        return self._of_id[id]

    def _text(self, id: int) -> str:
        if self._tokenizer is None:
            return f"[{id}] "
        text = self._tokenizer.decode([id])
        if not text:
            return f"[{id}]"  # beyond the tokenizer: models pad their vocabulary
        token = self._tokenizer.convert_ids_to_tokens(id)
        # SentencePiece tokenizers mark a leading space, and lose it in a lone token.
        starts_word = isinstance(token, str) and token.startswith("\u2581")
        return " " + text if starts_word and not text.startswith(" ") else text

    def _place(self, text: str) -> int:
        if text not in self._index:
            self._index[text] = len(self.table)
            self.table.append(text)
        return self._index[text]
