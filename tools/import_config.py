"""A verl or SOD launch script, or Hydra overrides, as a configuration for tools/train_sod.py.

python tools/import_config.py run.sh --num-prompts 30128 --out configs/mine.yaml
python tools/import_config.py actor_rollout_ref.rollout.n=16 data.train_batch_size=64 ...
"""

import argparse
import sys
from pathlib import Path

from megatron_sod.command_line import user_errors
from megatron_sod.config.import_account import account, check_loads, source_text
from megatron_sod.config.import_verl import import_verl
from megatron_sod.config.verl_script import read_script


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="+", help="one launch script, or key=value overrides")
    parser.add_argument("--out", help="file to write; default: standard output")
    parser.add_argument("--num-prompts", type=int, help="rows of the training files, for epochs")
    parser.add_argument(
        "--variable", action="append", default=[], metavar="NAME=VALUE", help="set for the script"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of ours, added last"
    )
    arguments = parser.parse_args()
    with user_errors():
        variables = dict(pair.split("=", 1) for pair in arguments.variable)
        imported = import_verl(
            read_script(source_text(arguments.source), variables), num_prompts=arguments.num_prompts
        )
        for pair in arguments.set:
            key, _, value = pair.partition("=")
            imported.values[key] = value
        text = imported.to_yaml()
        if arguments.out:
            Path(arguments.out).write_text(text)
        else:
            print(text, end="")
        print(account(imported), file=sys.stderr)
        check_loads(text)


if __name__ == "__main__":
    main()
