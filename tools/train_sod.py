"""Train a student by step-wise on-policy distillation.

torchrun --nproc-per-node N tools/train_sod.py --config FILE [key=value ...]
"""

from megatron_sod.command_line import run_training
from megatron_sod.config.load import load_config


def main() -> None:
    run_training(__doc__, load_config, "megatron_sod.pipeline:train")


if __name__ == "__main__":
    main()
