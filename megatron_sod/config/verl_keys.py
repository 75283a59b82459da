"""Keys of verl and of the public SOD recipe: where each goes here, or why it goes nowhere."""

from __future__ import annotations

from typing import Any

_P = "actor_rollout_ref"

# Carried over unchanged: theirs -> ours.
SAME: dict[str, str] = {
    "algorithm.token_kl_reg.stepwise_epsilon": "distill.step_weight.epsilon",
    "algorithm.token_kl_reg.stepwise_delta": "distill.step_weight.delta",
    "algorithm.token_kl_reg.stepwise_opd_coef": "distill.coef",
    "data.train_files": "data.train",
    "data.val_files": "data.eval",
    "data.prompt_key": "data.prompt_key",
    "data.shuffle": "data.shuffle",
    "data.seed": "seed",
    "data.train_batch_size": "train.train_batch_size",
    "data.max_prompt_length": "rollout.max_prompt_length",
    "data.max_response_length": "rollout.max_response_length",
    f"{_P}.model.path": "student.path",
    f"{_P}.ref.model.path": "teacher.path",
    f"{_P}.actor.clip_ratio_low": "grpo.clip_low",
    f"{_P}.actor.clip_ratio_high": "grpo.clip_high",
    f"{_P}.actor.clip_ratio_c": "grpo.dual_clip",
    f"{_P}.actor.ppo_mini_batch_size": "train.ppo_mini_batch_size",
    f"{_P}.actor.ppo_max_token_len_per_gpu": "train.tokens_per_micro_batch",
    f"{_P}.actor.grad_clip": "train.clip_grad",
    f"{_P}.actor.optim.lr": "train.lr",
    f"{_P}.actor.fsdp_config.param_offload": "train.param_offload",
    f"{_P}.actor.fsdp_config.optimizer_offload": "train.optimizer_offload",
    f"{_P}.actor.megatron.param_offload": "train.param_offload",
    f"{_P}.actor.megatron.optimizer_offload": "train.optimizer_offload",
    f"{_P}.ref.fsdp_config.param_offload": "teacher.param_offload",
    f"{_P}.ref.megatron.param_offload": "teacher.param_offload",
    f"{_P}.actor.optim.weight_decay": "train.weight_decay",
    f"{_P}.actor.optim.lr_warmup_steps": "train.lr_warmup_steps",
    f"{_P}.actor.optim.clip_grad": "train.clip_grad",
    f"{_P}.rollout.n": "rollout.num_generations",
    f"{_P}.rollout.temperature": "rollout.temperature",
    f"{_P}.rollout.tensor_model_parallel_size": "rollout.engine.tensor_parallel_size",
    f"{_P}.rollout.gpu_memory_utilization": "rollout.engine.gpu_memory_utilization",
    f"{_P}.rollout.max_num_seqs": "rollout.engine.max_num_seqs",
    f"{_P}.rollout.dtype": "rollout.engine.dtype",
    f"{_P}.rollout.multi_turn.max_assistant_turns": "rollout.max_turns",
    f"{_P}.rollout.multi_turn.max_parallel_calls": "rollout.max_tool_calls_per_turn",
    f"{_P}.rollout.val_kwargs.n": "eval.num_samples",
    f"{_P}.rollout.val_kwargs.temperature": "eval.temperature",
    f"{_P}.rollout.val_kwargs.top_p": "eval.top_p",
    "reward_model.reward_kwargs.overlong_buffer_cfg.len": "reward.overlong_buffer",
    "trainer.experiment_name": "name",
    "trainer.default_local_dir": "observe.run_dir",
    "trainer.n_gpus_per_node": "cluster.gpus_per_node",
    "trainer.nnodes": "cluster.num_nodes",
    "trainer.save_freq": "train.save_interval",
    "trainer.test_freq": "train.eval_interval",
    "trainer.total_training_steps": "train.num_iterations",
    "trainer.max_actor_ckpt_to_keep": "train.keep_last",
}
for _size in (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
):
    SAME[f"{_P}.actor.megatron.{_size}"] = f"student.parallel.{_size}"
    SAME[f"{_P}.ref.megatron.{_size}"] = f"teacher.parallel.{_size}"

# Needs no key here as long as the value is the one given: theirs -> (value, why, otherwise).
ONLY: dict[str, tuple[Any, str, str]] = {
    "algorithm.adv_estimator": (
        "grpo",
        "not needed: advantages are group-relative",
        "no counterpart: only group-relative advantages exist here",
    ),
    "algorithm.use_kl_in_reward": (
        False,
        "not needed: no KL is taken from the reward",
        "no counterpart: the teacher enters through distill.*, not the reward",
    ),
    "algorithm.norm_adv_by_std_in_grpo": (
        True,
        "not needed: advantages are divided by the group's deviation",
        "no counterpart: advantages are always divided by the group's deviation",
    ),
    "algorithm.filter_groups.enable": (
        False,
        "not needed: groups of equal rewards get advantage 0",
        "no counterpart: groups of equal rewards get advantage 0 and are not sampled again",
    ),
    f"{_P}.actor.use_kl_loss": (
        False,
        "not needed: there is no KL loss beside the teacher's",
        "no counterpart: give the reference model as `teacher` with method opd_naive or opd",
    ),
    f"{_P}.actor.loss_agg_mode": (
        "token-mean",
        "not needed: the loss is the mean over all tokens of a mini-batch, on all ranks",
        "no counterpart: the loss is always the mean over all tokens of a mini-batch",
    ),
    f"{_P}.actor.entropy_coeff": (
        0,
        "not needed: there is no entropy bonus",
        "no counterpart: there is no entropy bonus",
    ),
    f"{_P}.actor.ppo_epochs": (
        1,
        "not needed: each rollout is used once",
        "no counterpart: each rollout is used once",
    ),
    f"{_P}.rollout.name": (
        "vllm",
        "not needed: rollouts run in vLLM",
        "no counterpart: rollouts run in vLLM only",
    ),
    f"{_P}.rollout.mode": (
        "async",
        "not needed: engines always serve asynchronously",
        "not needed: engines always serve asynchronously",
    ),
    f"{_P}.rollout.top_p": (
        1,
        "not needed: training samples with top_p 1",
        "no counterpart: training samples with top_p 1, so that log-probabilities are exact",
    ),
    f"{_P}.rollout.top_k": (
        -1,
        "not needed: training samples without top_k",
        "no counterpart: training samples without top_k",
    ),
    f"{_P}.rollout.multi_turn.enable": (
        True,
        "not needed: rollouts are multi-turn",
        "set rollout.max_turns=1 for a single turn without tools",
    ),
    f"{_P}.rollout.multi_turn.format": (
        "hermes",
        "not needed: Hermes calls are parsed",
        "no counterpart: only Hermes tool calls are parsed",
    ),
    f"{_P}.rollout.val_kwargs.do_sample": (
        True,
        "not needed: evaluation samples at eval.temperature",
        "no counterpart: evaluation samples at eval.temperature; lower it instead",
    ),
    "reward_model.enable": (
        False,
        "not needed: rewards come from rules",
        "no counterpart: rewards come from rules or from reward.function",
    ),
    "reward_model.reward_kwargs.overlong_buffer_cfg.penalty_factor": (
        1,
        "not needed: the reward falls by 1 over reward.overlong_buffer",
        "no counterpart: the reward falls by 1 over reward.overlong_buffer",
    ),
}

# Carried by nothing, with the reason; a key that ends in a dot stands for all below it.
NOWHERE: dict[str, str] = {
    "algorithm.kl_ctrl.": "not needed: no KL is taken from the reward",
    "algorithm.filter_groups.": "not needed: groups of equal rewards get advantage 0",
    "algorithm.token_kl_reg.gamma": "not needed: the recipe reads it without step weights only",
    "algorithm.token_kl_reg.beta_min": "not needed: the recipe reads it without step weights only",
    "algorithm.token_kl_reg.beta_max": "not needed: the recipe reads it without step weights only",
    "data.return_raw_chat": "not needed: one renderer serves rollouts, scoring and evaluation",
    "data.filter_overlong_prompts": "handled elsewhere: prompts over rollout.max_prompt_length "
    "are left out and counted; the tools' text is part of the length",
    "data.truncation": "handled elsewhere: prompts are never cut, see data.filter_overlong_prompts",
    "data.custom_cls.": "handled elsewhere: data.prompt_key and data.answer_key name the columns "
    "of JSONL and Parquet files",
    "data.val_batch_size": "not needed: the whole evaluation set is in flight together",
    "custom_reward_function.": "handled elsewhere: reward.kind=auto grades by each prompt's "
    "answer, reward.kind=reference as the recipe does; a function of your own is "
    "reward.kind=import and takes (prompt, text)",
    "reward_model.reward_manager": "handled elsewhere: reward.kind; overlong answers: "
    "reward.overlong_buffer",
    "reward_model.reward_kwargs.max_resp_len": "not needed: rollout.max_response_length is used",
    "reward_model.reward_kwargs.overlong_buffer_cfg.log": "no counterpart",
    f"{_P}.hybrid_engine": "not needed: trainers and engines always share the job",
    f"{_P}.model.use_remove_padding": "not needed: sequences are always packed",
    f"{_P}.model.enable_gradient_checkpointing": "handled elsewhere: student.recompute, which "
    "--dry-run says you need or not",
    f"{_P}.model.": "no counterpart",
    f"{_P}.actor.kl_loss_coef": "not needed: there is no KL loss beside the teacher's",
    f"{_P}.actor.kl_loss_type": "not needed: there is no KL loss beside the teacher's",
    f"{_P}.actor.use_dynamic_bsz": "not needed: micro-batches are always filled by tokens",
    f"{_P}.actor.ppo_micro_batch_size_per_gpu": "not needed: micro-batches are filled by tokens "
    "(train.tokens_per_micro_batch)",
    f"{_P}.actor.strategy": "not needed: Megatron-Core trains",
    f"{_P}.actor.fsdp_config.": "no counterpart: Megatron shards by student.parallel and "
    "train.use_distributed_optimizer",
    f"{_P}.ref.fsdp_config.": "not needed: the teacher is sharded by teacher.parallel",
    f"{_P}.ref.log_prob_": "not needed: both models score the training micro-batches",
    f"{_P}.rollout.log_prob_": "not needed: both models score the training micro-batches",
    f"{_P}.rollout.multi_turn.max_user_turns": "not needed: rollout.max_turns counts the "
    "student's turns",
    f"{_P}.rollout.multi_turn.max_tool_response_length": "other unit: it counts characters, "
    "rollout.max_observation_length tokens",
    f"{_P}.rollout.multi_turn.tool_response_truncate_side": "not needed: the middle is left out",
    f"{_P}.rollout.multi_turn.tool_config_path": "handled elsewhere: sandbox.* (kind local needs "
    "no service; kind sandbox_fusion takes the file's address in sandbox.url)",
    "trainer.project_name": "no counterpart: `name` names the run",
    "trainer.val_before_train": "not needed: the student is always evaluated before training",
    "trainer.log_val_generations": "handled elsewhere: observe.num_trajectories_kept, shown by "
    "tools/inspect_run.py",
    "trainer.critic_warmup": "not needed: there is no critic",
    "trainer.balance_batch": "not needed: micro-batches are balanced over data-parallel ranks",
    "trainer.device": "not needed: torch decides",
    "critic.": "not needed: there is no critic",
    "ray_init.": "handled elsewhere: RAY_ADDRESS joins a cluster, else one is started",
    "hydra.": "not needed: there is no Hydra",
}
