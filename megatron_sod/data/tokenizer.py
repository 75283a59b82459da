"""The tokenizer of a model directory, from tokenizer.json or from a sentencepiece model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_sod.errors import ModelError


def load_tokenizer(model_dir: str | Path) -> Any:
    """A transformers fast tokenizer; where both files are present tokenizer.json is used.

    Raises:
        ModelError: no tokenizer files there, or a sentencepiece model that cannot be used.
    """
    from transformers import AutoTokenizer

    folder = Path(model_dir)
    if not folder.is_dir():
        raise ModelError(
            f"model directory {model_dir}: no such directory; give the path of a model in Hugging "
            "Face format"
        )
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        from megatron_sod.data.sentencepiece_tokenizer import load_sentencepiece

        return load_sentencepiece(folder)
    try:
        # Without files transformers would make an empty tokenizer out of config.json.
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise ValueError("no tokenizer.json")
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model directory {model_dir}: no tokenizer can be loaded there ({error}); copy "
            "tokenizer.json (or tokenizer.model) and tokenizer_config.json beside the weights"
        ) from error
