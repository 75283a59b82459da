"""The invariance certificate: loss, d_k, w_k and every gradient, in every layout, as a table.

    python tools/check_layouts.py [--family dense] [--only NAME ...]

Starts one, two and four CPU ranks in turn; needs no GPU and no model. Exit status 1 if any layout
differs from a single process by more than the tolerance.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def measure_all(cases: dict, models: tuple[str, str]) -> dict:
    """On every rank; the results of rank 0 count."""
    from megatron_sod.scoring.certificate import measure

    return {name: measure(case, *models) for name, case in cases.items()}


def run(cases: dict, models: tuple[str, str]) -> dict:
    """Every case on as many ranks as it needs."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    results: dict = {}
    for ranks in sorted({case.ranks for case in cases.values()}):
        these = {name: case for name, case in cases.items() if case.ranks == ranks}
        options = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=ranks, rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", max_restarts=0,
        )  # fmt: skip
        results |= elastic_launch(options, measure_all)(these, models)[0]
    return results


def main() -> int:
    from megatron_sod.scoring.certificate_cases import FAMILIES, TRUTH, write_models

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, help="default: all")
    parser.add_argument("--only", nargs="*", help="names of layouts")
    options = parser.parse_args()
    has_failed = False
    for family in [options.family] if options.family else FAMILIES:
        cases, tolerance = FAMILIES[family]
        chosen = {n: c for n, c in cases.items() if not options.only or n in options.only}
        with tempfile.TemporaryDirectory() as folder:
            results = run(TRUTH | chosen, write_models(Path(folder), family))
        print(f"\n{family}: largest absolute difference, tolerance {tolerance:g}")
        print(f"{'layout':34}" + "".join(f"{name:>11}" for name in _quantities(results)))
        for name, case in chosen.items():
            errors = results[name].errors(results[case.loss])
            is_bad = max(errors.values()) > tolerance
            has_failed |= is_bad
            print(
                f"{name:34}" + "".join(f"{e:11.1e}" for e in errors.values()) + " FAILED" * is_bad
            )
    return int(has_failed)


def _quantities(results: dict) -> list[str]:
    truth = next(iter(results.values()))
    return list(truth.errors(truth))


if __name__ == "__main__":
    sys.exit(main())
