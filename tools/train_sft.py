"""Cold start on multi-turn tool trajectories.

torchrun --nproc-per-node N tools/train_sft.py --config FILE [key=value ...]
"""

from megatron_sod.command_line import run_training
from megatron_sod.config.load import load_sft_config


def main() -> None:
    run_training(__doc__, load_sft_config, "megatron_sod.train.sft:run_sft")


if __name__ == "__main__":
    main()
