#!/usr/bin/env bash
# One node: every GPU of this machine. Needs the NVIDIA container toolkit.
#   docker/run_node.sh configs/FILE.yaml [key=value ...]
set -euo pipefail
config=${1:?usage: docker/run_node.sh CONFIG [key=value ...]}
shift
image=${SOD_IMAGE:-megatron_sod}
gpus=${SOD_GPUS_PER_NODE:-$(nvidia-smi --list-gpus | wc -l)}

# --shm-size: weights travel to the engines through /dev/shm. memlock, stack: as NVIDIA asks.
# The seccomp option lets the sandbox open namespaces of its own (level L3); without it the sandbox
# takes L2, which needs no privilege.
exec docker run --rm -it --gpus all --network host \
  --shm-size "${SOD_SHM_SIZE:-64g}" --ulimit memlock=-1 --ulimit stack=67108864 \
  ${SOD_SANDBOX_NAMESPACES:+--security-opt seccomp=unconfined} \
  -v "${SOD_MODELS:-$PWD/models}:/opt/megatron_sod/models:ro" \
  -v "${SOD_DATA:-$PWD/data}:/opt/megatron_sod/data:ro" \
  -v "${SOD_RUNS:-$PWD/runs}:/runs" \
  "$image" \
  torchrun --standalone --nproc-per-node "$gpus" tools/train_sod.py --config "$config" \
  "cluster.gpus_per_node=$gpus" "observe.run_dir=/runs/{name}" "$@"
