"""Every installed implementation of the op against float64, as a table; exit code 1 on a miss.

python tools/check_loss.py --vocab-size 151936 --tensor-model-parallel-size 2 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megatron_sod.ops import check, dispatch  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    parser.add_argument("--dtype", choices=sorted(check.TOLERANCES), default="bfloat16")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--jsd-beta", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    case = check.Case(
        vocab_size=options.vocab_size,
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        divisible_by=options.make_vocab_size_divisible_by,
        dtype=options.dtype,
        temperature=options.temperature,
        jsd_beta=options.jsd_beta,
        tokens=options.tokens,
        seed=options.seed,
    )
    print(f"{'device':8}{'implementation':16}{'quantity':18}{'largest error':>14}{'allowed':>10}")
    missed = 0
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        for name, implementation in dispatch.installed_implementations(device).items():
            for row in check.errors(case, implementation, device):
                missed += not row.passed
                verdict = "" if row.passed else "  MISS"
                print(
                    f"{device:8}{name:16}{row.quantity:18}{row.error:14.2e}"
                    f"{row.allowed:10.0e}{verdict}"
                )
    print("all within tolerance" if not missed else f"{missed} quantities missed their tolerance")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
