"""Tokenizers by directory: tokenizer.json, or a sentencepiece model that keeps its exact ids.

Layer: pure; sentencepiece trains small models on the spot and is the oracle. The tiny tokenizer
itself: tests/data/test_tiny_tokenizer.py; student against teacher: tests/model/test_parity.py.
"""

from __future__ import annotations

import json
import random

import pytest
import sentencepiece

from megatron_sod.data import sentencepiece_tokenizer
from megatron_sod.data.chat import ChatFormat
from megatron_sod.data.tiny_tokenizer import save_tiny_tokenizer
from megatron_sod.data.tokenizer import load_tokenizer
from megatron_sod.errors import ModelError

PLAIN = dict(normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True)
CONTROL = ["<|im_start|>", "<|im_end|>"]
KINDS = {
    "llama": dict(model_type="bpe", split_digits=True, **PLAIN),
    "no_space_in_front": dict(
        model_type="bpe", add_dummy_prefix=False, user_defined_symbols=["<code>"], **PLAIN
    ),
    "unigram": dict(model_type="unigram", **PLAIN),
    "normalizing": dict(model_type="bpe"),  # NFKC, runs of spaces collapse, unknown characters
    "normalizing_unigram": dict(model_type="unigram", byte_fallback=True),
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _train(folder, **options):
    """A sentencepiece model of some 300 pieces; returns the processor."""
    rng = random.Random(0)
    words = [
        "number",
        "plus",
        "is",
        "Hello",
        "world",
        "call",
        "the",
        "tool",
        "print",
        "x",
        "caf\u00e9",
    ]
    lines = [
        " ".join(rng.choice([*words, str(rng.randrange(500)), "= (", "):"]) for _ in range(9))
        for _ in range(400)
    ]
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            vocab_size=380,
            hard_vocab_limit=False,
            control_symbols=CONTROL,
            minloglevel=2,
            **options,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return folder, _train(folder, **KINDS[request.param])


def _texts(count: int) -> list[str]:
    rng = random.Random(1)
    alphabet = [
        *"abcdeHlopt =():x0123456789.,",
        " ",
        "  ",
        "\n",
        "\t",
        "\u00e9",
        "\u6f22",
        "\u00bd",
        "\U0001f642",
    ]
    return ["".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(count)]


def test_sentencepiece_ids_are_kept_exactly(trained):
    folder, oracle = trained
    tokenizer = load_tokenizer(folder)
    for text in _texts(400):
        assert tokenizer.encode(text, add_special_tokens=False) == oracle.encode(text), repr(text)
        assert tokenizer.encode(text) == oracle.encode(text)  # nothing is added unasked


def test_text_comes_back_as_sentencepiece_gives_it(trained):
    folder, oracle = trained
    tokenizer = load_tokenizer(folder)
    known = [t for t in _texts(400) if oracle.unk_id() not in oracle.encode(t)]
    assert len(known) > 30
    for text in known:
        ids = oracle.encode(text)
        assert tokenizer.decode(ids) == oracle.decode(ids), repr(text)


def test_pieces_and_special_ids_are_the_models(trained):
    folder, oracle = trained
    tokenizer = load_tokenizer(folder)
    pieces = {oracle.id_to_piece(i): i for i in range(oracle.vocab_size())}
    assert tokenizer.get_vocab() == pieces and len(tokenizer) == oracle.vocab_size()
    assert tokenizer.eos_token_id == oracle.eos_id() and tokenizer.bos_token_id == oracle.bos_id()
    assert tokenizer.unk_token_id == oracle.unk_id() and tokenizer.is_fast
    assert tokenizer.encode("<|im_end|>") == [oracle.piece_to_id("<|im_end|>")]


def test_configuration_and_chat_template_are_kept(tmp_path):
    oracle = _train(tmp_path, **KINDS["llama"])
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>"})
    )
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    chat = ChatFormat(load_tokenizer(tmp_path), tools=None)
    end = oracle.piece_to_id("<|im_end|>")
    assert chat.stop_token_ids[0] == chat.end_of_turn_id == end
    messages = [{"role": "user", "content": "Hello world"}, {"role": "assistant", "content": "12"}]
    rendered = chat.conversation(messages)
    spoken = [i for i, m in zip(rendered.token_ids, rendered.loss_mask, strict=True) if m]
    prompt = chat.prompt_ids(messages[:1])
    assert rendered.token_ids[: len(prompt) + len(spoken)] == prompt + spoken
    assert spoken[-1] == end and oracle.decode(spoken[:-1]) == "12"


def test_tokenizer_json_wins_where_both_are_present(tmp_path):
    save_tiny_tokenizer(tmp_path)
    expected = load_tokenizer(tmp_path).get_vocab()
    _train(tmp_path, **KINDS["llama"])
    assert load_tokenizer(tmp_path).get_vocab() == expected


@pytest.mark.parametrize("content", [b"", b"neither a protobuf nor anything else", b"\x0a\x03abc"])
def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelError, match="tokenizer.model: not a sentencepiece model"):
        load_tokenizer(tmp_path)


def test_a_word_model_is_refused(tmp_path):
    _train(tmp_path, model_type="word")
    with pytest.raises(ModelError, match="unigram and BPE are read"):
        load_tokenizer(tmp_path)


def test_a_difference_from_sentencepiece_is_found_at_loading(tmp_path, monkeypatch):
    _train(tmp_path, **KINDS["llama"])
    monkeypatch.setattr(sentencepiece_tokenizer, "_merges", lambda scores: [])
    with pytest.raises(ModelError, match="sentencepiece encodes 'Hello world.*tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_missing_model_directory_or_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match="no such directory"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tmp_path)
