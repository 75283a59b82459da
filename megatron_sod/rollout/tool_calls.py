"""Hermes tool calls out of sampled tokens.

A call starts at the `<tool_call>` token, by id, after the last `</think>`. Its JSON ends where the
JSON ends (`raw_decode`): a code string may contain `</tool_call>`, and `<tool_call>` too.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field
from typing import Any

_TAG = "<tool_call>"
_SPACE = re.compile(r"\s*")
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
        self._start = _single_id(tokenizer, _TAG)
        self._think_end = _single_id(tokenizer, "</think>")

    def parse(self, token_ids: list[int]) -> list[ToolCall]:
        """Calls of one assistant turn, in order; empty when the turn makes none."""
        text, starts = self._text_and_starts(token_ids)
        calls, end = [], 0
        for start in starts:
            if start >= end:  # else the tag stands inside the JSON of the call before it
                call, end = _parse_call(text, start)
                calls.append(call)
        return calls

    def _text_and_starts(self, token_ids: list[int]) -> tuple[str, list[int]]:
        """The turn's text after its thought, and where in it a call may begin."""
        if self._think_end in token_ids:
            last = len(token_ids) - 1 - token_ids[::-1].index(self._think_end)
            token_ids = token_ids[last + 1 :]
        if self._start is None:  # families whose tokenizer spells the tag in several tokens
            text = self._tokenizer.decode(token_ids)
            return text, [match.end() for match in re.finditer(_TAG, text)]
        tags = [i for i, token in enumerate(token_ids) if token == self._start]
        bounds = itertools.pairwise([-1, *tags, len(token_ids)])
        pieces = [self._tokenizer.decode(token_ids[i + 1 : j]) for i, j in bounds]
        lengths = [len(piece) + len(_TAG) for piece in pieces[:-1]]
        return _TAG.join(pieces), list(itertools.accumulate(lengths))


def _parse_call(text: str, start: int) -> tuple[ToolCall, int]:
    """The call whose JSON begins at `start`, and where the JSON ends."""
    space = _SPACE.match(text, start)
    try:
        call, end = _DECODER.raw_decode(text, space.end() if space else start)
    except (ValueError, RecursionError) as error:
        return ToolCall(problem=f"the tool call is not valid JSON: {_reason(error)}"), start
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolCall(problem='the tool call must be {"name": ..., "arguments": {...}}'), end
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # some models quote the arguments once more
        try:
            arguments = json.loads(arguments, strict=False)
        except (ValueError, RecursionError) as error:
            problem = f"the arguments are not valid JSON: {_reason(error)}"
            return ToolCall(call["name"], problem=problem), end
    if not isinstance(arguments, dict):
        return ToolCall(call["name"], problem="the arguments must be a JSON object"), end
    return ToolCall(call["name"], arguments), end


def _reason(error: ValueError | RecursionError) -> str:
    """What the model is told; Python's own words only where they are about its text."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"


def _single_id(tokenizer: Any, text: str) -> int | None:
    token_id = tokenizer.convert_tokens_to_ids(text)
    if token_id is None or token_id == tokenizer.unk_token_id:
        return None
    return token_id
