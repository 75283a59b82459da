"""Rollouts one iteration ahead against strictly on-policy ones, on the demo, alternating.

python tools/overlap_benchmark.py [--seeds 0,1,2] [--reuse] [--out FILE] [key=value ...]

Writes seconds per iteration, importance weights and success to docs/benchmarks/overlap.md.
"""

import argparse
from pathlib import Path

from megatron_sod.command_line import user_errors
from megatron_sod.eval.overlap import compare

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/overlap.md")
    parser.add_argument("--reuse", action="store_true", help="keep runs that are finished")
    parser.add_argument("overrides", nargs="*", help="dotted key=value for every run")
    given = parser.parse_args()
    with user_errors():
        seeds = [int(seed) for seed in given.seeds.split(",")]
        text = "\n".join(compare(ROOT, seeds, given.overrides, reuse=given.reuse)) + "\n"
        given.out.write_text(text)
        print(text)


if __name__ == "__main__":
    main()
