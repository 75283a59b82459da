"""The benchmark behind `make bench`: checks, then times, then writes docs/benchmarks/.

    python kernels/bench/run.py [--tokens 16 64] [--repetitions 7] [--gpu]

The CPU table always; the instruction count where valgrind and a compiler exist; the GPU table with
--gpu on a machine that has one. What did not run is written down as not run.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]
import cpu  # noqa: E402
import instructions  # noqa: E402
import steps  # noqa: E402

from megatron_sod.ops import dispatch  # noqa: E402

DOCS = ROOT / "docs" / "benchmarks"


def processor() -> str:
    """The processor in words; no host name, no paths."""
    with open("/proc/cpuinfo") as info:
        text = info.read()
    model = next((x.split(":")[1].strip() for x in text.splitlines() if "model name" in x), "CPU")
    widest = "AVX-512" if "avx512bw" in text else "AVX2" if "avx2" in text else "scalar"
    return f"{model}, {widest}, one thread"


def timing_table(tokens: int, repetitions: int) -> list[str]:
    table = cpu.timed(tokens, repetitions)
    eager = table["PyTorch eager (log_softmax + kl_div)"]
    lines = [
        f"bf16, V = {cpu.VOCAB:,}, {tokens} tokens; median of {repetitions} interleaved "
        "repetitions; ns of processor time per (token x column).",
        "",
        "| | forward | forward + backward | eager / this, forward | eager / this, both |",
        "|---|---|---|---|---|",
    ]
    for name, (forward, both) in table.items():
        lines.append(
            f"| {name} | {forward:.2f} | {both:.2f} | {eager[0] / forward:.1f} | "
            f"{eager[1] / both:.1f} |"
        )
    return [*lines, ""]


def cpu_report(tokens: list[int], repetitions: int) -> str:
    torch.set_num_threads(1)
    errors = cpu.check()
    tables = [line for count in tokens for line in timing_table(count, repetitions)]
    peak = {which: cpu.peak_extra_bytes(which, 64) for which in ("op", "eager")}
    weights = steps.measure()
    served = "compiled" if "cpu" in dispatch.COMPILED_DEVICES else "PyTorch fallback"
    lines = [
        "# The op on a CPU",
        "",
        f"{datetime.date.today()}, {processor()}, torch {torch.__version__}, {served}. "
        "Written by `make bench`.",
        "",
        *tables,
        "The op's forward returns both logprobs, both entropies and both KLs; the others one KL "
        "(or one logprob). Its backward is the in-place one. Eager's temporaries (4 bytes x tokens "
        "x V each) are sometimes reused by the allocator and sometimes mapped and zeroed anew, so "
        "its times at few tokens vary from run to run; above 32 MB glibc always maps anew, as at "
        "every real batch size.",
        "",
        "Largest error against float64 (KL in nats; gradient of the summed KL, bf16):",
        "",
        "| | KL | gradient |",
        "|---|---|---|",
        *errors,
        "",
        f"Peak extra memory of forward + backward, 64 tokens: eager {peak['eager'] / 1e6:.1f} MB, "
        f"this op in place {peak['op'] / 1e6:.2f} MB "
        f"({100 * peak['op'] / max(peak['eager'], 1):.2f} % of eager's).",
        "",
        "## Instructions",
        "",
        instruction_lines(),
        "",
        "## Step weights",
        "",
        f"1,024 trajectories of 16 steps, {weights['tokens']:,} counted tokens, packed, one core: "
        f"{weights['ours_ms']:.1f} ms from logprobs to one weight per token. The literal per-token "
        f"loop of Eq. 6-7 in Python (16 trajectories run, scaled to 1,024): "
        f"{weights['loop_ms'] / 1e3:.1f} s, a ratio of {weights['ratio']:.0f}; largest difference "
        f"of a weight {weights['largest_difference']:.1e}.",
        "",
    ]
    return "\n".join(lines)


def instruction_lines() -> str:
    if shutil.which("valgrind") is None:
        return "Not run: no valgrind on this machine."
    counts = {isa: instructions.instructions_per_pair(isa) for isa in ("avx2",)}
    return (
        f"Scoring pass under callgrind, AVX2 path: {counts['avx2']:.2f} instructions per "
        f"(token x column); the limit is {instructions.LIMIT_AVX2:.0f}."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--gpu", action="store_true", help="also the GPU table")
    options = parser.parse_args()
    DOCS.mkdir(parents=True, exist_ok=True)
    report = cpu_report(options.tokens, options.repetitions)
    (DOCS / "cpu.md").write_text(report)
    print(report)
    if options.gpu:
        import gpu

        report = gpu.report()
        (DOCS / "gpu.md").write_text(report)
        print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
