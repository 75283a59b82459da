"""Tokenizers the tests render with: the tiny one, and the real Qwen3 one where it is provided."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_sod.data.tiny_tokenizer import train_tiny_tokenizer
from megatron_sod.data.tokenizer import load_tokenizer

VARIABLE = "SOD_SHARED_DATA"
QWEN3 = "tokenizer_qwen3_0p6b"


@cache
def tiny_tokenizer() -> Any:
    return train_tiny_tokenizer()


@cache
def _qwen3(folder: str) -> Any:
    return load_tokenizer(folder)


def qwen3_tokenizer() -> Any:
    """The real tokenizer. Skips when the variable is unset; fails when it is set but wrong."""
    root = os.environ.get(VARIABLE)
    if not root:
        pytest.skip(f"{VARIABLE} is not set: it names the folder that holds {QWEN3}/")
    folder = Path(root) / QWEN3
    if not folder.is_dir():
        pytest.fail(f"{VARIABLE}={root}, but {folder} does not exist")
    return _qwen3(str(folder))
