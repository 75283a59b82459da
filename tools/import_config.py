"""A verl or SOD launch script, or Hydra overrides, as a configuration for tools/train_sod.py.

python tools/import_config.py run.sh --num-prompts 30128 --out configs/mine.yaml
python tools/import_config.py actor_rollout_ref.rollout.n=16 data.train_batch_size=64 ...
"""

import argparse
import sys
import tempfile
from pathlib import Path

from megatron_sod.command_line import user_errors
from megatron_sod.config.import_verl import Imported, import_verl
from megatron_sod.config.load import load_config
from megatron_sod.config.verl_script import read_script
from megatron_sod.errors import ConfigError


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
            read_script(_text(arguments.source), variables), num_prompts=arguments.num_prompts
        )
        for pair in arguments.set:
            key, _, value = pair.partition("=")
            imported.values[key] = value
        text = imported.to_yaml()
        if arguments.out:
            Path(arguments.out).write_text(text)
        else:
            print(text, end="")
        say_account(imported)
        check(text)


def _text(source: list[str]) -> str:
    if len(source) == 1 and "=" not in source[0]:
        path = Path(source[0])
        if not path.is_file():
            raise ConfigError(f"{path}: no such script; give a file, or overrides as key=value")
        return path.read_text()
    return "\n".join(source)


def say_account(imported: Imported) -> None:
    """Where each key went, on standard error."""
    lines = [f"{len(imported.carried)} keys carried over"]
    lines += [f"  {theirs} -> {ours}" for theirs, ours in imported.carried.items()]
    lines += [f"{len(imported.left)} keys not carried over"]
    lines += [f"  {key}: {why}" for key, why in imported.left.items()]
    lines += ["assumed", *(f"  {note}" for note in imported.assumed)]
    print("\n".join(lines), file=sys.stderr)


def check(text: str) -> None:
    """Load the result as the trainer would.

    Raises:
        ConfigError: what is still to be set, all of it at once.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        try:
            load_config(file.name)
        except ConfigError as error:
            problems = str(error).replace(file.name, "the result")
            raise ConfigError(f"{problems}\nset the missing keys with --set KEY=VALUE") from error


if __name__ == "__main__":
    main()
