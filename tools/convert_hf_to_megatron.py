"""Convert a Hugging Face directory to a Megatron distributed checkpoint.

python tools/convert_hf_to_megatron.py --hf DIR --out DIR [--tensor-model-parallel-size T ...]

The checkpoint loads at every layout. The sizes given here decide how it is cut into files: one
file holds what one rank of that layout owns; the checkpoint loads at any other layout as well.
"""

import argparse

from megatron_sod.command_line import user_errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", required=True, help="directory with config.json, *.safetensors")
    parser.add_argument("--out", required=True, help="directory to write; must not hold anything")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--expert-model-parallel-size", type=int, default=1)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: as the source stores"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest file, as 5GB or 200MB")
    parser.add_argument(
        "--check-logits",
        nargs="?",
        const="",
        metavar="FILE",
        help="compare logits with transformers on the lines of FILE, or on two built-in texts",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with user_errors():
        import torch

        from megatron_sod.config.schema import ParallelConfig
        from megatron_sod.convert.output import num_bytes
        from megatron_sod.convert.to_megatron import convert_hf_to_megatron
        from megatron_sod.observe.progress import progress

        parallel = ParallelConfig(
            tensor_model_parallel_size=arguments.tensor_model_parallel_size,
            pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
            expert_model_parallel_size=arguments.expert_model_parallel_size,
        )
        with progress("convert", 100, unit="percent") as bar:
            report = convert_hf_to_megatron(
                arguments.hf,
                arguments.out,
                parallel=parallel,
                dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
                max_shard_bytes=num_bytes(arguments.max_shard_size),
                on_progress=lambda done, total: bar.update(100 * done // max(total, 1)),
            )
        if arguments.check_logits is not None:
            from megatron_sod.scoring.logits_parity import add_logits

            add_logits(report, arguments.out, arguments.hf, arguments.out, arguments.check_logits)
        print(report.text())


if __name__ == "__main__":
    main()
