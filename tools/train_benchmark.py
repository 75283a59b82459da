"""Tokens per second and peak memory of training iterations with random weights.

python tools/train_benchmark.py [--student qwen3-0.6b] [--teachers qwen3-1.7b,qwen3-4b] [--ranks 1]
    [--iterations 4] [--prompts 8] [--generations 8] [--out FILE] [key=value ...]

Models are named as in configs/models. Needs neither weights, Ray nor vLLM.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from megatron_sod.command_line import user_errors
from megatron_sod.plan.throughput import Work, measure, page

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default="qwen3-0.6b")
    parser.add_argument("--teachers", default="qwen3-1.7b,qwen3-4b", help="comma-separated")
    parser.add_argument("--ranks", type=int, default=1, help="trainer ranks on this machine")
    parser.add_argument("--iterations", type=int, default=4, help="the first is not timed")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8, help="trajectories per prompt")
    parser.add_argument("--prompt-length", type=int, default=384, help="tokens")
    parser.add_argument("--response-length", type=int, default=4950, help="tokens, mean")
    parser.add_argument("--out", type=Path, help="also write the page there")
    parser.add_argument("overrides", nargs="*", help="dotted key=value for every run")
    given = parser.parse_args()
    rows = []
    with user_errors():
        for teacher in given.teachers.split(","):
            work = Work(
                given.student,
                teacher,
                given.ranks,
                given.iterations,
                given.prompts,
                given.generations,
                given.prompt_length,
                given.response_length,
            )
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(ROOT, Path(folder), work, given.overrides))
        text = page(rows, " ".join(["python", "tools/train_benchmark.py", *sys.argv[1:]]))
    if given.out is not None:
        given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
