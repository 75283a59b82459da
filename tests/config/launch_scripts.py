"""A launch script in the shape verl's users write, with the keys and values of the SOD recipe."""

SOD = r"""
#!/usr/bin/env bash
set -euo pipefail   # as scripts do

export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1,2,3,4,5,6,7}
STUDENT=${STUDENT:-models/qwen3-1.7b}
TEACHER=${TEACHER:-"models/qwen3-4b"}
RUN=${RUN:-sod_small}
OUT=${OUT:-./ckpt/$RUN}
TRAIN="['data/rl.parquet']"
TEST="['data/aime25.parquet', 'data/aime24.parquet']"
prompt=2560
response=20480
tokens=$(((prompt + response) * 1))
wide=$((tokens * 4))

python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    algorithm.use_kl_in_reward=False \
    algorithm.kl_ctrl.kl_coef=0.002 \
    +algorithm.filter_groups.enable=False \
    +algorithm.filter_groups.metric=seq_reward \
    +algorithm.token_kl_reg.enable=True \
    +algorithm.token_kl_reg.gamma=1.0 \
    +algorithm.token_kl_reg.stepwise_enable=True \
    +algorithm.token_kl_reg.stepwise_epsilon=1e-6 \
    +algorithm.token_kl_reg.stepwise_delta=0.2 \
    +algorithm.token_kl_reg.stepwise_opd_coef=1.0 \
    data.train_files="$TRAIN" data.val_files="$TEST" \
    data.train_batch_size=64 \
    data.max_prompt_length=$prompt \
    data.max_response_length=${response} \
    data.filter_overlong_prompts=True \
    data.truncation='error' \
    data.custom_cls.path=recipe/x.py \
    custom_reward_function.name=compute_score \
    actor_rollout_ref.model.path=$STUDENT \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.actor.clip_ratio_low=0.2 \
    actor_rollout_ref.actor.clip_ratio_high=0.28 \
    actor_rollout_ref.actor.loss_agg_mode=token-mean \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=16 \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=$tokens \
    actor_rollout_ref.actor.ulysses_sequence_parallel_size=4 \
    actor_rollout_ref.actor.fsdp_config.param_offload=False \
    +actor_rollout_ref.ref.model.path=$TEACHER \
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=$wide \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.tensor_model_parallel_size=4 \
    actor_rollout_ref.rollout.multi_turn.max_assistant_turns=16 \
    actor_rollout_ref.rollout.multi_turn.tool_config_path=recipe/tool.yaml \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.75 \
    actor_rollout_ref.rollout.n=16 \
    actor_rollout_ref.rollout.val_kwargs.top_p=0.6 \
    actor_rollout_ref.rollout.val_kwargs.n=32 \
    +reward_model.reward_kwargs.overlong_buffer_cfg.enable=True \
    +reward_model.reward_kwargs.overlong_buffer_cfg.len=$((1024 * 1)) \
    +reward_model.reward_kwargs.overlong_buffer_cfg.penalty_factor=1.0 \
    trainer.logger='["console","wandb","mlflow"]' \
    trainer.experiment_name=$RUN \
    trainer.n_gpus_per_node=8 trainer.nnodes=1 \
    trainer.save_freq=10 trainer.test_freq=10 \
    trainer.default_local_dir=$OUT \
    trainer.a_key_of_tomorrow=7 \
    trainer.total_epochs=1 "$@"
"""
