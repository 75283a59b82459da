"""Evaluate a model directory with the agent loop, tools and graders of training.

tools/evaluate.py --model DIR --data FILE... --num-samples 32 --out DIR [--config FILE] [key=value]
"""

import argparse

from megatron_sod.command_line import user_errors
from megatron_sod.config.load import load_eval_config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="directory in Hugging Face format")
    parser.add_argument("--data", nargs="+", help="files of tasks, or tiny_world:SPLIT:COUNT")
    parser.add_argument("--num-samples", type=int, help="trajectories per task")
    parser.add_argument("--out", required=True, help="samples and report.json go there")
    parser.add_argument("--config", help="YAML with the protocol, see configs/eval_*.yaml")
    arguments, overrides = parser.parse_known_args()
    if arguments.data:  # key=value may follow the files
        overrides = [item for item in arguments.data if "=" in item] + overrides
        arguments.data = [item for item in arguments.data if "=" not in item]
    with user_errors():
        config = load_eval_config(
            arguments.config,
            overrides,
            model=arguments.model,
            data=arguments.data,
            num_samples=arguments.num_samples,
        )
        from megatron_sod.eval.evaluation import evaluate_model

        evaluate_model(config, arguments.out)


if __name__ == "__main__":
    main()
