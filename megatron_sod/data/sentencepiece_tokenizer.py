"""Tokenizers that come as a sentencepiece model (tokenizer.model), without tokenizer.json.

The model is rebuilt in the `tokenizers` library from its own settings, because the chat format
needs offsets and special tokens, and then checked against sentencepiece. The translations
transformers offers are not used: they ignore some of these settings (a model without a space in
front, one with its own normalization, leading spaces), and the ids differ without a word.

A text after a special token is encoded as a text of its own, as everywhere in this package. In a
unigram model, text that spells a byte piece ("<0x41>") becomes that piece; sentencepiece spells it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from megatron_sod.errors import ModelError

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # SentencePiece.Type
_SPACE = "\u2581"
_NEVER = -1e6  # score of pieces that must not arise from text
PROBES = (
    "Hello world, 12 plus 7  is 19.",
    "  two leading spaces, two trailing  ",
    "line\nbreak\n\n  x = f(1)\n\ttabbed",
    '{"name": "run", "arguments": {"code": "print(3**2)"}}',
    "caf\u00e9 na\u00efve \u6f22\u5b57 \U0001f642 \u00bd \uff21",
    "\\boxed{42} $x^2$ <s",
    "a",
    " ",
    "",
)


def load_sentencepiece(model_dir: str | Path) -> Any:
    """A transformers fast tokenizer that splits text as the directory's tokenizer.model does.

    Chat template and special tokens of tokenizer_config.json are kept; where it is silent the
    model's own special pieces serve.

    Raises:
        ModelError: the file is no sentencepiece model, or it cannot be rebuilt exactly.
    """
    from transformers import PreTrainedTokenizerFast

    path = Path(model_dir) / "tokenizer.model"
    model, proto = _read(path)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json"):
            if (path.parent / name).is_file():
                shutil.copyfile(path.parent / name, Path(folder) / name)
        _rebuild(path, proto).save(f"{folder}/tokenizer.json")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(_config(path, model)))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    tokenizer.name_or_path = str(model_dir)
    _check(path, model, tokenizer)
    return tokenizer


def _read(path: Path) -> tuple[Any, Any]:
    import sentencepiece
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
        if not proto.pieces:
            raise RuntimeError("it has no pieces")
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()), proto
    except (DecodeError, RuntimeError) as error:
        raise ModelError(
            f"{path}: not a sentencepiece model ({error}); copy it again, or copy tokenizer.json "
            "beside it"
        ) from error


def _rebuild(path: Path, proto: Any) -> Tokenizer:
    tokenizer = Tokenizer(_model(path, proto))
    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in proto.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer


def _model(path: Path, proto: Any) -> Any:
    trainer, pieces = proto.trainer_spec, proto.pieces
    if trainer.model_type == _UNIGRAM:
        scores = [(p.piece, p.score if p.type == _NORMAL else _NEVER) for p in pieces]
        return models.Unigram(scores, trainer.unk_id, trainer.byte_fallback)
    if trainer.model_type == _BPE:
        return models.BPE(
            {piece.piece: number for number, piece in enumerate(pieces)},
            _merges({piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    raise ModelError(
        f"{path}: a sentencepiece model of type {trainer.model_type}; unigram and BPE are read"
    )


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best-scored piece first."""
    found = [
        (-score, cut, piece)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(piece[:cut], piece[cut:]) for _, cut, piece in sorted(found)]


def _config(path: Path, model: Any) -> dict:
    """tokenizer_config.json with the model's own special pieces where it names none."""
    file = path.parent / "tokenizer_config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for role in ("bos", "eos", "pad", "unk"):
        number = getattr(model, f"{role}_id")()
        if number >= 0 and config.get(f"{role}_token") is None:
            config[f"{role}_token"] = model.id_to_piece(number)
    return config


def _check(path: Path, model: Any, tokenizer: Any) -> None:
    """Same pieces, same ids, same text back."""
    for number in range(model.vocab_size()):
        if tokenizer.convert_ids_to_tokens(number) != model.id_to_piece(number):
            raise ModelError(
                f"{path}: id {number} is {model.id_to_piece(number)!r} there and "
                f"{tokenizer.convert_ids_to_tokens(number)!r} after loading; copy tokenizer.json "
                "beside it"
            )
    for text in PROBES:
        expected, found = model.encode(text), tokenizer.encode(text, add_special_tokens=False)
        is_known = model.unk_id() not in expected
        if found != expected or (is_known and tokenizer.decode(found) != model.decode(found)):
            raise ModelError(
                f"{path}: sentencepiece encodes {text!r} as {expected}, the rebuilt tokenizer as "
                f"{found}; copy the tokenizer.json of this model beside it"
            )
