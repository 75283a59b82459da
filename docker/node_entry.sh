#!/usr/bin/env bash
# What runs on every node of a multi-node job: its part of one Ray cluster, and its torchrun.
#   NODE_RANK, NUM_NODES, MASTER_ADDR, GPUS_PER_NODE come from the scheduler's launch file.
#   docker/node_entry.sh CONFIG [key=value ...]
set -euo pipefail
: "${NODE_RANK:?}" "${NUM_NODES:?}" "${MASTER_ADDR:?}" "${GPUS_PER_NODE:?}"
config=${1:?usage: docker/node_entry.sh CONFIG [key=value ...]}
shift
ray_port=${RAY_PORT:-6379}
torch_port=${MASTER_PORT:-29500}

# Ray lowers its workers' priority by default; engines would starve beside the trainers.
export RAY_worker_niceness=0

# torchrun owns the GPUs: Ray counts none, the engines get explicit device ids.
if [ "$NODE_RANK" = 0 ]; then
  ray start --head --port "$ray_port" --num-gpus 0 --include-dashboard false
else
  for _ in $(seq 60); do
    ray start --address "$MASTER_ADDR:$ray_port" --num-gpus 0 && break
    sleep 2
  done
fi
trap 'ray stop --force' EXIT
export RAY_ADDRESS="$MASTER_ADDR:$ray_port"

torchrun --nnodes "$NUM_NODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS_PER_NODE" \
  --rdzv-backend c10d --rdzv-id "${JOB_ID:-sod}" --rdzv-endpoint "$MASTER_ADDR:$torch_port" \
  tools/train_sod.py --config "$config" \
  "cluster.num_nodes=$NUM_NODES" "cluster.gpus_per_node=$GPUS_PER_NODE" \
  "observe.run_dir=/runs/{name}" "$@"
