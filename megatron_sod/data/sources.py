"""Prompts and conversations by name: files a user brings, or the tiny world."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sod.data import tiny_world
from megatron_sod.data.chat import ChatFormat
from megatron_sod.errors import DataError
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
    """Rendered prompts of all sources, in file order; over-long ones are counted and left out.

    Raises:
        DataError: a file is missing, a row is not usable, or nothing is left.
    """
    prompts, num_too_long = [], 0
    for source in sources:
        for number, (row, origin) in enumerate(_rows(source)):
            keys = (prompt_key, answer_key, hint_key)
            prompt = _prompt(row, origin, f"{source}:{number}", chat, *keys)
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
        from megatron_sod.observe.progress import say

        say(f"data: {num_too_long} prompts longer than {max_length} tokens left out")
    return prompts


def load_conversations(sources: list[str], *, seed: int) -> Iterator[list[dict]]:
    """Cold-start conversations: `messages` of each row, or generated ones."""
    for source in sources:
        if match := _TINY_WORLD.fullmatch(source):
            split, count = match[1], int(match[2])
            if split != "train":
                raise DataError(f"{source}: conversations come from the train split only")
            yield from tiny_world.conversations(count, seed=seed, num_operations=_operations(match))
            continue
        for row, origin in _rows(source):
            if not _is_chat(row.get("messages")):
                raise DataError(
                    f"{origin}: no list `messages` of role and content; found keys {sorted(row)}"
                )
            yield row["messages"]


def _prompt(
    row: dict,
    origin: str,
    prompt_id: str,
    chat: ChatFormat,
    prompt_key: str,
    answer_key: str,
    hint_key: str,
) -> Prompt:
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
    return Prompt(
        prompt_id=prompt_id,
        token_ids=chat.prompt_ids(messages),
        answer=str(row[answer_key]),
        data_source=str(row.get("data_source") or ""),
        messages=messages,
        hint=str(row.get(hint_key) or ""),
    )


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
            yield row, f"{source} row {number}"
        return
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"data file {source}: no such file; give a .jsonl or .parquet path, or "
            "tiny_world:SPLIT:COUNT"
        )
    yield from _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)


def _parquet_rows(path: Path) -> Iterator[tuple[dict, str]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield row, f"{path} row {number}"


def _jsonl_rows(path: Path) -> Iterator[tuple[dict, str]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if not line.isascii() and any("\udc80" <= c <= "\udcff" for c in line):
                raise DataError(f"{path} row {number}: not UTF-8 text; convert the file")
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path} row {number}: not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{path} row {number}: expected an object, found {row!r:.80}")
            yield row, f"{path} row {number}"
