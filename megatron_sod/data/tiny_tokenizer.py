"""A byte-level BPE tokenizer of a few hundred tokens with Qwen3's control tokens and chat format.

Digits stay single tokens, so that copying a number is copying its digits. The chat template
renders what Qwen3's renders in non-thinking use: a system turn listing the tools when tools are
given, tool results wrapped in `<tool_response>` inside a user turn.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_sod.data import tiny_world
from megatron_sod.errors import DataError

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
# Words with an optional leading space, single digits, runs of punctuation, white space.
PIECE_PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"

CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
{{- '<|im_start|>user' }}
{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def train_tiny_tokenizer(vocab_size: int = 384, *, num_conversations: int = 400):
    """Train the tokenizer on generated conversations.

    Returns:
        PreTrainedTokenizerFast with exactly `vocab_size` ids.
    Raises:
        DataError: the conversations are too uniform for so many tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    num_added = len(CONTROL_TOKENS) + len(MARKUP_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - num_added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(num_conversations), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        clean_up_tokenization_spaces=False,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL_TOKENS)})
    tokenizer.add_tokens(list(MARKUP_TOKENS))
    if len(tokenizer) != vocab_size:
        raise DataError(
            f"tiny tokenizer: the generated conversations give {len(tokenizer)} tokens; "
            f"{vocab_size} were asked for"
        )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _corpus(num_conversations: int):
    for messages in tiny_world.conversations(num_conversations, seed=0, tool_failure_rate=0.1):
        yield "\n".join(f"{message['role']}\n{message['content']}" for message in messages)
    # Text outside the world still encodes in whole words where it is common.
    yield "system # Tools <tools> assistant user tool The answer is Error Traceback line " * 20


def save_tiny_tokenizer(directory: Path, vocab_size: int = 384) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template into `directory`."""
    train_tiny_tokenizer(vocab_size).save_pretrained(directory)
