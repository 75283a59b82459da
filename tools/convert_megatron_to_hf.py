"""Convert a Megatron distributed checkpoint to a Hugging Face directory.

python tools/convert_megatron_to_hf.py --checkpoint DIR --out DIR

DIR is what convert_hf_to_megatron.py wrote, or an iter_* folder of a run's checkpoints/. Nothing
else is needed: configuration and tokenizer are in it.
"""

import argparse

from megatron_sod.command_line import user_errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="directory with .metadata in it")
    parser.add_argument("--out", required=True, help="directory to write; must not hold anything")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file, as 5GB or 200MB")
    parser.add_argument(
        "--check-logits",
        nargs="?",
        const="",
        metavar="FILE",
        help="compare logits with transformers on the lines of FILE, or on two built-in texts",
    )
    arguments = parser.parse_args()
    with user_errors():
        from megatron_sod.convert.output import num_bytes
        from megatron_sod.convert.to_hf import convert_megatron_to_hf
        from megatron_sod.observe.progress import progress

        with progress("convert", 100, unit="percent") as bar:
            report = convert_megatron_to_hf(
                arguments.checkpoint,
                arguments.out,
                max_shard_bytes=num_bytes(arguments.max_shard_size),
                on_progress=lambda done, total: bar.update(100 * done // max(total, 1)),
            )
        if arguments.check_logits is not None:
            from megatron_sod.scoring.logits_parity import add_logits

            folders = (arguments.out, arguments.checkpoint)
            add_logits(report, arguments.out, *folders, arguments.check_logits)
        print(report.text())


if __name__ == "__main__":
    main()
