"""The one renderer of chats: for prompts, for observations in rollouts, for cold-start training.

Rollouts keep the ids the student sampled and append observation ids only; nothing is ever
re-tokenised. Control tokens come from the template alone: tool output is encoded with a copy of
the tokenizer that has no added tokens, so that printed text can never become `<|im_end|>`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer

from megatron_sod.errors import DataError

_PROBE = "\u2042PROBE\u2042"  # a text no template contains


@dataclass(frozen=True)
class RenderedConversation:
    """Ids of one whole-conversation render."""

    token_ids: list[int]
    loss_mask: list[bool]  # True on assistant tokens, the end-of-turn token included
    step_ids: list[int]  # 0 outside assistant turns, else 1..K


@dataclass(frozen=True)
class _Glue:
    """Template text between two contents: plain text, ids from the first to the last control token,
    plain text."""

    before: str
    control_ids: list[int]
    after: str


class ChatFormat:
    """Chat rendering for one tokenizer."""

    def __init__(self, tokenizer: Any, *, tools: list[dict] | None, enable_thinking: bool = False):
        """
        Args:
            tokenizer: a transformers fast tokenizer with a chat template.
            tools: tool schemas listed in the prompt, or None.
        Raises:
            DataError: the tokenizer has no chat template, or its template lacks what tool use
                needs (an assistant marker, a wrapper around tool messages).
        """
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"tokenizer {getattr(tokenizer, 'name_or_path', '?')}: no chat template; take the "
                "tokenizer of a chat model, or add chat_template.jinja to its directory"
            )
        self.tokenizer = tokenizer
        self._tools = tools
        self._options = {"enable_thinking": enable_thinking}
        self._plain = _without_added_tokens(tokenizer)
        self._derive_wrappers()

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an assistant turn: the end-of-turn token, then the end of text.

        Tokenizers of chat models name the end of turn as eos and keep the end of text for padding.
        """
        ends = [self.end_of_turn_id]
        for token_id in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id):
            if token_id is not None and token_id not in ends:
                ends.append(token_id)
        return ends

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """Ids of the conversation so far, ending with the assistant marker."""
        return self.tokenizer(self._text(messages, generate=True), add_special_tokens=False)[
            "input_ids"
        ]

    def observation_ids(self, texts: list[str]) -> list[int]:
        """What follows a turn's end-of-turn token: a newline, the tool results, the next marker."""
        ids = list(self._open.control_ids)
        for index, text in enumerate(texts):
            before = self._between.after if index else self._open.after
            following = self._between if index < len(texts) - 1 else self._close
            # The template's own newlines are encoded with the text, as in one whole render, where
            # ".\n" may be a single token.
            ids += self.plain_ids(before + text + following.before) + following.control_ids
        return ids

    def plain_ids(self, text: str) -> list[int]:
        """Ids of text in which no added token can appear; decodes to the same text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)

    def conversation(self, messages: list[dict]) -> RenderedConversation:
        """One render of the whole conversation, with the assistant's tokens marked.

        Raises:
            DataError: the template does not render an assistant turn as a continuation of its
                own prompt, so its tokens cannot be told apart.
        """
        text = self._text(messages, generate=False)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        step_of_character = [0] * (len(text) + 1)
        step = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            step += 1
            start, end = self._assistant_span(text, messages, index)
            step_of_character[start:end] = [step] * (end - start)
        step_ids = [step_of_character[start] for start, _ in encoded["offset_mapping"]]
        return RenderedConversation(encoded["input_ids"], [s > 0 for s in step_ids], step_ids)

    def _assistant_span(self, text: str, messages: list[dict], index: int) -> tuple[int, int]:
        # Without thinking Qwen3 opens a generated turn with an empty thought, but renders one in
        # the last turn of a conversation only: earlier turns start at the plain marker.
        for options in (self._options, {"enable_thinking": True}):
            before = self._text(messages[:index], generate=True, options=options)
            if text.startswith(before):
                end = text.index(self._end_text, len(before)) + len(self._end_text)
                return len(before), end
        raise DataError(
            f"message {index}: the chat template rewrites earlier turns, so the assistant's "
            "tokens cannot be located; use a template that renders turns incrementally"
        )

    def _text(self, messages: list[dict], *, generate: bool, options: dict | None = None) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            tools=self._tools,
            tokenize=False,
            add_generation_prompt=generate,
            **(self._options if options is None else options),
        )

    def _derive_wrappers(self) -> None:
        """Find the text around tool results by rendering a conversation with probes in it."""
        opening = [{"role": "user", "content": "q"}, {"role": "assistant", "content": _PROBE}]
        tools = [{"role": "tool", "content": _PROBE}] * 2
        text = self._text(opening + tools, generate=True)
        parts = text.split(_PROBE)
        if len(parts) != 4:
            raise DataError(
                "chat template: expected it to render one assistant and two tool messages, found "
                f"{len(parts) - 1} of 3; use a template with tool support"
            )
        _, after_turn, between, close = parts
        prefix = self._text(opening, generate=False).split(_PROBE)[1]
        end_ids = self.tokenizer(prefix, add_special_tokens=False)["input_ids"]
        self.end_of_turn_id = end_ids[0]
        self._end_text = self.tokenizer.decode([self.end_of_turn_id])
        if not after_turn.startswith(self._end_text):
            raise DataError("chat template: an assistant turn does not end with one special token")
        opening_glue = self._glue(after_turn[len(self._end_text) :])
        leading = self.plain_ids(opening_glue.before)
        self._open = replace(opening_glue, control_ids=leading + opening_glue.control_ids)
        self._between = self._glue(between)
        closing_glue = self._glue(close)
        trailing = self.plain_ids(closing_glue.after)
        self._close = replace(closing_glue, control_ids=closing_glue.control_ids + trailing)

    def _glue(self, text: str) -> _Glue:
        """Cut template text at its first and last added token."""
        added = self.tokenizer.get_added_vocab()
        starts = [text.find(token) for token in added if token in text]
        ends = [text.rfind(token) + len(token) for token in added if token in text]
        if not starts:
            raise DataError(f"chat template: no control token in {text!r}, next to a tool result")
        first, last = min(starts), max(ends)
        ids = self.tokenizer(text[first:last], add_special_tokens=False)["input_ids"]
        return _Glue(text[:first], ids, text[last:])


def _without_added_tokens(tokenizer: Any) -> Tokenizer:
    """The same BPE without any added token."""

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = []
    state["post_processor"] = None
    return Tokenizer.from_str(json.dumps(state))
