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

_THINKING = {"enable_thinking": True}
_PROBE = "\u2042PROBE\u2042"  # a text no template contains


@dataclass(frozen=True)
class RenderedConversation:
    """Ids of a whole conversation."""

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
        return self._ids(self._text(messages, generate=True))

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
        """The ids a rollout holds in which the student wrote these assistant turns.

        Equal to one render of the whole conversation wherever the template opens a turn as it
        prompts for one. Without thinking Qwen3 does not: it prompts with an empty thought, and
        renders one in the last turn only. Rollouts read it before every turn, so it stands before
        every turn here too, as context without loss.

        Raises:
            DataError: the template does not render an assistant turn as a continuation of its own
                prompt, or a turn holds a thought although thinking is off.
        """
        text = self._text(messages, generate=False)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [self._assistant_span(text, messages, i) for i in turns]
        if not turns:
            ids = self._ids(text)
            return RenderedConversation(ids, [False] * len(ids), [0] * len(ids))
        ids = self.prompt_ids(messages[: turns[0]])
        step_ids = [0] * len(ids)
        for step, (start, end) in enumerate(spans, 1):
            turn = self._ids(text[start:end])
            following = self._between_turns(messages, turns, spans, text, step)
            ids += turn + following
            step_ids += [step] * len(turn) + [0] * len(following)
        return RenderedConversation(ids, [s > 0 for s in step_ids], step_ids)

    def _between_turns(self, messages, turns, spans, text: str, step: int) -> list[int]:
        """Context ids from the end of turn `step` to the start of the next, or of the text."""
        if step == len(turns):
            return self._ids(text[spans[-1][1] :])
        between = messages[turns[step - 1] + 1 : turns[step]]
        if between and all(message["role"] == "tool" for message in between):
            return self.observation_ids([_plain_content(message) for message in between])
        gap = text[spans[step - 1][1] : spans[step][0]].removesuffix(self._thought)
        return self._ids(gap + self._thought)

    def _assistant_span(self, text: str, messages: list[dict], index: int) -> tuple[int, int]:
        """Where in `text` the student's part of a turn begins and ends."""
        before = self._text(messages[:index], generate=True, options=_THINKING)
        if not text.startswith(before):
            raise DataError(
                f"message {index}: the chat template rewrites earlier turns, so the assistant's "
                "tokens cannot be located; use a template that renders turns incrementally"
            )
        start = len(before)
        if self._thought and text.startswith(self._thought, start):
            start += len(self._thought)
        elif self._thought and text.startswith("<think>", start):
            raise DataError(
                f"message {index}: the turn holds a thought, but data.enable_thinking is false and "
                "rollouts would never sample one; set it to true, or remove the thoughts"
            )
        return start, text.index(self._end_text, start) + len(self._end_text)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

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
        self.end_of_turn_id = self._ids(prefix)[0]
        self._end_text = self.tokenizer.decode([self.end_of_turn_id])
        if not after_turn.startswith(self._end_text):
            raise DataError("chat template: an assistant turn does not end with one special token")
        opening_glue = self._glue(after_turn[len(self._end_text) :])
        leading = self.plain_ids(opening_glue.before)
        self._open = replace(opening_glue, control_ids=leading + opening_glue.control_ids)
        self._between = self._glue(between)
        question = opening[:1]
        marker = self._text(question, generate=True, options=_THINKING)
        # What the template adds to the assistant marker so that no thought is sampled.
        self._thought = self._text(question, generate=True).removeprefix(marker)
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
        return _Glue(text[:first], self._ids(text[first:last]), text[last:])


def _plain_content(message: dict) -> str:
    content = message["content"]
    if not isinstance(content, str):
        raise DataError(f"a tool message must have text as content; found {content!r:.80}")
    return content


def _without_added_tokens(tokenizer: Any) -> Tokenizer:
    """The same BPE without any added token."""

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = []
    state["post_processor"] = None
    return Tokenizer.from_str(json.dumps(state))
