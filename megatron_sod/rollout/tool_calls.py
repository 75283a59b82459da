"""Hermes tool calls out of sampled tokens.

A call starts at the `<tool_call>` token (by id, so that the same characters inside a code string do
not count) after the last `</think>`. Its JSON ends where the JSON ends (`raw_decode`), not at the
first `</tool_call>`, which a code string may contain.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

_DECODER = json.JSONDecoder(strict=False)  # models write raw newlines inside strings


@dataclass(frozen=True)
class ToolCall:
    """One call as the model wrote it; `problem` says why it cannot be run."""

    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


class ToolCallParser:
    """Finds calls in a turn's token ids."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._start = _single_id(tokenizer, "<tool_call>")
        self._think_end = _single_id(tokenizer, "</think>")

    def parse(self, token_ids: list[int]) -> list[ToolCall]:
        """Calls of one assistant turn, in order; empty when the turn makes none."""
        return [_parse_call(text) for text in self._call_texts(token_ids)]

    def _call_texts(self, token_ids: list[int]) -> list[str]:
        if self._think_end in token_ids:
            last = len(token_ids) - 1 - token_ids[::-1].index(self._think_end)
            token_ids = token_ids[last + 1 :]
        if self._start is None:  # families whose tokenizer spells the tag in several tokens
            return self._tokenizer.decode(token_ids).split("<tool_call>")[1:]
        starts = [i for i, token in enumerate(token_ids) if token == self._start]
        bounds = [*starts, len(token_ids)]
        return [
            self._tokenizer.decode(token_ids[start + 1 : end])
            for start, end in itertools.pairwise(bounds)
        ]


def _parse_call(text: str) -> ToolCall:
    try:
        call, _ = _DECODER.raw_decode(text.lstrip())
    except (json.JSONDecodeError, RecursionError) as error:
        return ToolCall(problem=f"the tool call is not valid JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolCall(problem='the tool call must be {"name": ..., "arguments": {...}}')
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # some models quote the arguments once more
        try:
            arguments = json.loads(arguments, strict=False)
        except json.JSONDecodeError as error:
            return ToolCall(call["name"], problem=f"the arguments are not valid JSON: {error}")
    if not isinstance(arguments, dict):
        return ToolCall(call["name"], problem="the arguments must be a JSON object")
    return ToolCall(call["name"], arguments)


def _single_id(tokenizer: Any, text: str) -> int | None:
    token_id = tokenizer.convert_tokens_to_ids(text)
    if token_id is None or token_id == tokenizer.unk_token_id:
        return None
    return token_id
