"""Prompts and conversations by name: files a user brings, or the tiny world."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sod.data import tiny_world
from megatron_sod.data.benchmarks import Task, read_task
from megatron_sod.data.chat import ChatFormat
from megatron_sod.data.rows import file_rows
from megatron_sod.errors import DataError
from megatron_sod.observe.progress import say
from megatron_sod.types import Prompt

_TINY_WORLD = re.compile(r"tiny_world:(\w+):(\d+)(?::(\d+)-(\d+))?")


def tool_schemas() -> list[dict]:
    """The tools a student may call, in the form chat templates take."""
    return tiny_world.TOOLS


def load_prompts(
    sources: list[str],
    chat: ChatFormat,
    *,
    prompt_key: str,
    answer_key: str,
    max_length: int,
    hint_key: str = "hint",
) -> list[Prompt]:
    """As `read_prompts`, without the count."""
    options = dict(prompt_key=prompt_key, answer_key=answer_key, hint_key=hint_key)
    return read_prompts(sources, chat, max_length=max_length, **options)[0]


def read_prompts(
    sources: list[str],
    chat: ChatFormat,
    *,
    prompt_key: str,
    answer_key: str,
    max_length: int,
    hint_key: str = "hint",
) -> tuple[list[Prompt], int]:
    """(rendered prompts of all sources, in file order; how many were over-long and are left out).

    Raises:
        DataError: a file is missing, a row is not usable, or nothing is left.
    """
    prompts, num_too_long = [], 0
    names = _names(sources)
    for source in sources:
        for number, (row, origin) in enumerate(_rows(source)):
            task = _task(row, origin, prompt_key, answer_key)
            prompt = Prompt(
                prompt_id=f"{source}:{number}",
                token_ids=chat.prompt_ids(task.messages),
                answer=task.answer,
                data_source=str(row.get("data_source") or names[source]),
                messages=task.messages,
                hint=str(row.get(hint_key) or ""),
            )
            if len(prompt.token_ids) > max_length:
                num_too_long += 1
            else:
                prompts.append(prompt)
    if not prompts:
        raise DataError(
            f"data {sources}: no usable prompt ({num_too_long} longer than "
            f"rollout.max_prompt_length {max_length} tokens); add rows or raise the limit"
        )
    if num_too_long:
        say(f"data: {num_too_long} prompts longer than {max_length} tokens left out")
    return prompts, num_too_long


def load_conversations(sources: list[str], *, seed: int) -> Iterator[list[dict]]:
    """Cold-start conversations: `messages` of each row, or generated ones."""
    for source in sources:
        if match := _TINY_WORLD.fullmatch(source):
            split, count = match[1], int(match[2])
            if split != "train":
                raise DataError(f"{source}: conversations come from the train split only")
            yield from tiny_world.conversations(count, seed=seed, num_operations=_operations(match))
            continue
        num_foreign, foreign = 0, set[str]()
        for row, origin in _rows(source):
            if not _is_chat(row.get("messages")):
                raise DataError(
                    f"{origin}: no list `messages` of role and content; found keys {sorted(row)}"
                )
            names = _foreign_tools(row, origin)
            num_foreign, foreign = num_foreign + bool(names), foreign | names
            yield [_message(message) for message in row["messages"]]
        if num_foreign:
            say(
                f"data: {num_foreign} conversations of {source} list tools that rollouts will not "
                f"offer: {', '.join(sorted(foreign))}"
            )


def _foreign_tools(row: dict, origin: str) -> set[str]:
    """Names in a row's `tools` that are not ours; prompts list our tools whatever it says."""
    tools = row.get("tools") or []
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        names = {tool.get("function", tool)["name"] for tool in tools}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{origin}: `tools` must be a list of tool schemas; found {row['tools']!r:.80}"
        ) from error
    return names - {tool["function"]["name"] for tool in tool_schemas()}


def _message(message: dict) -> dict:
    """Without the empty columns Parquet adds, and with text where a turn only calls tools."""
    kept = {key: value for key, value in message.items() if value is not None}
    return {**kept, "content": kept.get("content", "")}


def _names(sources: list[str]) -> dict[str, str]:
    """What rows without a data_source are reported under: their file's name, with its folder, or
    else its whole path, where another file has the same. Not "tiny_world": that name is graded
    exactly."""
    forms = {}
    for source in sources:
        path = Path(source).absolute()
        forms[source] = (path.stem, f"{path.parent.name}-{path.stem}", source)
    taken = [Counter(form) for form in zip(*forms.values(), strict=True)]
    return {
        source: next(
            name
            for name, count in zip(form, taken, strict=True)
            if count[name] == 1 and name != "tiny_world"
        )
        for source, form in forms.items()
    }


def _task(row: dict, origin: str, prompt_key: str, answer_key: str) -> Task:
    """The columns the configuration names, where a row has them; else what the row's own columns
    say it is."""
    task = None
    if any(row.get(key) in (None, "") for key in (prompt_key, answer_key)):
        task = read_task(row, origin)
    return task or _plain_task(row, origin, prompt_key, answer_key)


def _plain_task(row: dict, origin: str, prompt_key: str, answer_key: str) -> Task:
    for key in (prompt_key, answer_key):
        if row.get(key) in (None, ""):
            raise DataError(
                f"{origin}: no value under {key!r}; found keys {sorted(row)}; set data.prompt_key "
                "and data.answer_key to this file's columns"
            )
    question = row[prompt_key]
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if not _is_chat(messages):
        raise DataError(
            f"{origin}: {prompt_key!r} must be text or a list of messages with role and content; "
            f"found {question!r:.80}"
        )
    return Task(messages, str(row[answer_key]))


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m
            for m in messages
        )
        and isinstance(messages[0]["content"], str)
    )


def _operations(match: re.Match) -> tuple[int, int]:
    return (int(match[3]), int(match[4])) if match[3] else (1, 4)


def _rows(source: str) -> Iterator[tuple[dict, str]]:
    """(row, where it stands) of one source."""
    if match := _TINY_WORLD.fullmatch(source):
        tasks = tiny_world.generate_tasks(
            match[1], int(match[2]), seed=0, num_operations=_operations(match)
        )
        for number, task in enumerate(tasks):
            row = {"prompt": task.question, "answer": task.answer, "data_source": "tiny_world"}
            row["hint"] = task.calls()[0][0]  # the first call's code
            yield row, f"{source} row {number}"
        return
    yield from file_rows(source)
