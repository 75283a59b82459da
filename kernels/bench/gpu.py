"""GPU table: checks against float64 first, then times with CUDA events beside a copy in one run.

8,192 tokens of bf16 logits, V = 151,936 and its tensor-parallel shards, the fused linear form, and
what else is installed: PyTorch eager and compiled always, Liger's Triton kernels where importable.
Every buffer is many times the L2 cache.
"""

from __future__ import annotations

import datetime
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import baselines  # noqa: E402

from megatron_sod.ops import HeadPair, fused_linear_loss, packed_step_weights  # noqa: E402
from megatron_sod.ops.reference import reference_divergence  # noqa: E402

VOCAB, TOKENS = 151_936, 8192
SHARDS = {1: 151_936, 2: 76_032, 4: 38_016, 8: 19_072}  # Megatron's padded widths
BARS_MS = {"score": 1.36, "train": 3.4, "score_tp8": 0.18, "fused_linear": 33.0}


def median_ms(call: Callable[[int], None], repetitions: int = 50) -> float:
    """Median time of `call(i)` on the device."""
    for i in range(5):
        call(i)
    times = []
    for i in range(repetitions):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(i)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per millisecond that a large copy reads plus writes."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda i: target.copy_(source), 20)


def logits(width: int, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(0)
    shape = dict(generator=generator, device="cuda", dtype=torch.bfloat16)
    student = torch.randn(tokens, width, **shape) * 2
    teacher = student + torch.randn(tokens, width, **shape) * 0.5
    return student, teacher, torch.randint(0, width, (tokens,), generator=generator, device="cuda")


def check() -> None:
    """The kernels agree with float64 before anything is timed."""
    student, teacher, targets = logits(VOCAB, 64)
    partials = torch.ops.sod.vp_stats(student, teacher, targets, 0, VOCAB, 1.0)
    rows = torch.ops.sod.vp_finish(partials[None], targets)
    want = reference_divergence(student.cpu(), teacher.cpu(), targets.cpu(), vocab_size=VOCAB)
    error = (rows[:, 2].cpu().double() - want.reverse_kl).abs().max()
    assert error < 5e-6, f"reverse KL is off by {error}"


def score_and_train(width: int, bandwidth: float) -> list[str]:
    """One table row per mode: K1 with the finish, then K1 + finish + K2 in place."""
    student, teacher, targets = logits(width)
    valid = min(width, VOCAB)
    coefficients = torch.zeros(TOKENS, 6, device="cuda")
    coefficients[:, 1] = 1.0
    # the gradient goes where in-place training puts it as far as traffic is concerned: a buffer of
    # the same shape, so that every repetition reads ordinary logits
    scratch = torch.empty_like(student)

    def score(i):
        partials = torch.ops.sod.vp_stats(student, teacher, targets, 0, valid, 1.0)
        return torch.ops.sod.vp_finish(partials[None], targets)

    def train(i):
        rows = score(i)
        torch.ops.sod.vp_grad_out(
            student, teacher, targets, rows, coefficients, 0, valid, 1.0, 0.0, scratch
        )

    lines = []
    for name, call, bytes_per_pair in (("score", score, 4), ("score + gradient", train, 10)):
        ms = median_ms(call)
        moved = bytes_per_pair * TOKENS * width
        share = 100 * moved / ms / bandwidth
        lines.append(f"| {name} | {width:,} | {ms:.3f} | {moved / ms / 1e9:.2f} | {share:.0f} % |")
    return lines


def fused_linear() -> list[str]:
    """1.7B <- 4B: hidden 2048 and 2560, all 8,192 rows carry loss; beside the bare products."""
    shape = dict(device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(TOKENS, 2048, **shape).mul_(0.05).requires_grad_()
    head = torch.randn(VOCAB, 2048, **shape).mul_(0.05)
    head = torch.nn.Parameter(head)
    head.main_grad = torch.zeros(head.shape, device="cuda")
    teacher_hidden = torch.randn(TOKENS, 2560, **shape) * 0.05
    teacher_head = torch.randn(VOCAB, 2560, **shape) * 0.05
    targets = torch.randint(0, VOCAB, (TOKENS,), device="cuda")
    lines = []
    for chunk in (2048, 4096):
        heads = HeadPair(head, teacher_head, 0, VOCAB, chunk_rows=chunk)

        def call(i, heads=heads):
            loss, _ = fused_linear_loss(
                hidden, teacher_hidden, targets, heads, lambda stats, rows: stats.reverse_kl
            )
            loss.backward()

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ms = median_ms(call, 10)
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9
        flops = 2 * TOKENS * VOCAB * (3 * 2048 + 2560)
        lines.append(f"| {chunk} | {ms:.1f} | {flops / ms / 1e9:.0f} | {peak:.2f} |")
    return lines


def others() -> list[str]:
    """Whole-logits contestants at 2,048 tokens: they need memory that 8,192 would not leave."""
    student, teacher, _ = logits(VOCAB, 2048)
    contestants = {
        "PyTorch eager": baselines.eager_kl,
        "torch.compile": torch.compile(baselines.eager_kl),
        "sharded KL under autograd": baselines.sharded_kl,
    }
    try:
        from liger_kernel.transformers.functional import liger_jsd, liger_kl_div
    except ImportError:
        note = ["| Liger Triton KL, JSD | not installed | |"]
    else:
        note = []

        def log_probs(x):
            return torch.log_softmax(x.float(), dim=-1)

        contestants["Liger Triton KL"] = lambda s, t: liger_kl_div(
            log_probs(s), log_probs(t), reduction="none", log_target=True
        ).sum(-1)
        contestants["Liger Triton JSD"] = lambda s, t: liger_jsd(log_probs(s), log_probs(t))
    lines = []
    for name, forward in contestants.items():
        with torch.no_grad():
            ahead = median_ms(lambda i, f=forward: f(student, teacher), 20)
        both = median_ms(lambda i, f=forward: baselines.step(f, student, teacher), 20)
        lines.append(f"| {name} | {ahead:.2f} | {both:.2f} |")
    return lines + note


def step_weights() -> str:
    tokens, rows, steps = 7_000_000, 1024, 16
    keys = torch.arange(tokens, device="cuda") * (rows * steps) // tokens
    case = (torch.rand(tokens, device="cuda"), torch.rand(tokens, device="cuda"))
    ids = ((keys % steps + 1).int(), (keys // steps).int())
    ms = median_ms(lambda i: packed_step_weights(*case, *ids, rows, steps))
    return f"{ms * 1e3:.0f} us for 7,000,000 tokens, 1,024 trajectories of 16 steps"


def report() -> str:
    """The page for docs/benchmarks/gpu.md."""
    check()
    bandwidth = copy_bandwidth()
    lines = [
        "# The op on a GPU",
        "",
        f"{datetime.date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"copy {bandwidth / 1e9:.2f} TB/s in the same run. {TOKENS:,} tokens, bf16.",
        f"Bars (one H200): {BARS_MS} ms.",
        "",
        "| | columns | ms | TB/s | share of the copy |",
        "|---|---|---|---|---|",
    ]
    for width in SHARDS.values():
        lines += score_and_train(width, bandwidth)
    lines += ["", "Fused linear, 1.7B <- 4B:", "", "| chunk | ms | TF/s | extra GB |"]
    lines += ["|---|---|---|---|", *fused_linear(), ""]
    lines += [
        "Others, 2,048 tokens (ms):",
        "",
        "| | forward | forward + backward |",
        "|---|---|---|",
    ]
    lines += [*others(), "", f"Step weights: {step_weights()}.", ""]
    return "\n".join(lines)
