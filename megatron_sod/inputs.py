"""What a run reads before it starts anything: geometries, tokenizers, prompts."""

from __future__ import annotations

from pathlib import Path

from megatron_sod.config.schema import SodConfig
from megatron_sod.convert.megatron_files import is_megatron_checkpoint
from megatron_sod.data.chat_parity import check_same_chat
from megatron_sod.data.order import PromptOrder
from megatron_sod.data.privileged import teacher_prompts
from megatron_sod.data.sources import load_prompts
from megatron_sod.data.tokenizer import load_tokenizer
from megatron_sod.errors import ConfigError
from megatron_sod.model.geometry import Geometry, layout_problems, load_geometry
from megatron_sod.model.parity import check_same_vocabulary, shared_vocab_size
from megatron_sod.model.weights import has_weights
from megatron_sod.rollout.recording import Recording
from megatron_sod.rollout.worker import make_chat
from megatron_sod.train.checkpoint_files import read_about


class Inputs:
    """Geometries, tokenizer and prompts, checked against each other and the configuration."""

    def __init__(self, config: SodConfig):
        if config.train.resume not in ("auto", "never"):
            read_about(Path(config.train.resume))
        self.student = load_geometry(config.student.path)
        problems = layout_problems(self.student, config.student.parallel, "student")
        self.tokenizer = load_tokenizer(config.student.path)
        self.teacher: Geometry | None = None
        if config.teacher is not None:
            self.teacher = load_geometry(config.teacher.path)
            problems += layout_problems(self.teacher, config.teacher.parallel, "teacher")
            teacher_tokenizer = load_tokenizer(config.teacher.path)
            check_same_vocabulary(self.student, self.teacher, self.tokenizer, teacher_tokenizer)
            if config.teacher.source == "self" and not has_weights(config.teacher.path):
                problems.append(
                    f"teacher.source self: {config.student.path} holds no weights to copy; start "
                    "from a trained model directory"
                )
            if config.eval.teacher and is_megatron_checkpoint(config.teacher.path):
                problems.append(
                    f"eval.teacher: engines cannot load the Megatron checkpoint "
                    f"{config.teacher.path}; convert it with tools/convert_megatron_to_hf.py or "
                    "set eval.teacher=false"
                )
        self.vocab_size = shared_vocab_size(self.student, self.teacher)  # ids with a probability
        if problems:
            raise ConfigError("\n".join(problems))
        chat = make_chat(config, config.student.path)
        if config.teacher is not None and not config.teacher.allow_template_mismatch:
            teacher_path = config.teacher.path
            check_same_chat(chat, lambda: make_chat(config, teacher_path))
        data, rollout = config.data, config.rollout
        options = dict(
            prompt_key=data.prompt_key,
            answer_key=data.answer_key,
            hint_key=data.hint_key,
            max_length=rollout.max_prompt_length,
        )
        self.prompts = load_prompts(data.train, chat, **options)  # type: ignore[arg-type]
        self.teacher_prompts = None
        if config.teacher is not None and config.teacher.privileged != "none":
            self.teacher_prompts = teacher_prompts(
                self.prompts,
                chat,
                config.teacher.privileged,
                max_extra_length=config.teacher.max_privileged_length,
            )
        self.eval_prompts = load_prompts(data.eval, chat, **options) if data.eval else []  # type: ignore[arg-type]
        PromptOrder(len(self.prompts), 0).draw(0, config.train.train_batch_size)
        if config.rollout.replay is not None:
            Recording(config.rollout.replay).check_complete(config.train.num_iterations)
