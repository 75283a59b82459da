"""What a run would do on other hardware, on paper.

python tools/plan.py what-if --config FILE [--gpus 8,64,1024] [--fixed-batch] [key=value ...]
python tools/plan.py picture --config FILE --out FILE.svg [key=value ...]
python tools/plan.py compare RUN_DIR [RUN_DIR ...]      constants fitted to the first run

For the plan of a configuration itself: tools/train_sod.py --config FILE --dry-run
"""

import argparse

from megatron_sod.command_line import user_errors
from megatron_sod.config.load import load_config
from megatron_sod.plan.measured import comparison, read_run
from megatron_sod.plan.picture import draw_iterations
from megatron_sod.plan.report import print_comparison, print_what_if
from megatron_sod.plan.scale import gpus_of, what_if


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    scale = commands.add_parser("what-if", help="step time and idle share by number of GPUs")
    scale.add_argument("--gpus", help="e.g. 8,64,1024; default: doubling up to 1,024")
    scale.add_argument("--fixed-batch", action="store_true", help="the batch does not grow")
    picture = commands.add_parser("picture", help="where the time goes")
    picture.add_argument("--out", required=True, help="an .svg file")
    for command in (scale, picture):
        command.add_argument("--config", required=True)
        command.add_argument("overrides", nargs="*", help="dotted key=value")
    compare = commands.add_parser("compare", help="predicted against measured phases")
    compare.add_argument("runs", nargs="+", metavar="RUN_DIR")
    arguments = parser.parse_args()
    with user_errors():
        globals()[arguments.command.replace("-", "_") + "_command"](arguments)


def what_if_command(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    counts = _doublings(gpus_of(config))
    if arguments.gpus is not None:
        counts = [int(count) for count in arguments.gpus.split(",")]
    print_what_if(what_if(config, counts, grow_batch=not arguments.fixed_batch))


def _doublings(first: int) -> list[int]:
    counts = [first]
    while counts[-1] * 2 <= 1024:
        counts.append(counts[-1] * 2)
    return counts


def picture_command(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    found = what_if(config, [gpus_of(config)], grow_batch=False)
    labelled = [(f"{times.placement}, staleness {times.staleness}", times) for times in found]
    print(draw_iterations(labelled, arguments.out))


def compare_command(arguments: argparse.Namespace) -> None:
    print_comparison(comparison([read_run(run) for run in arguments.runs]))


if __name__ == "__main__":
    main()
