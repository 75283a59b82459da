"""The CUDA kernels on a GPU: equality, shards, bits, streams, compute-sanitizer.

Everything here is marked gpu and skipped, with that reason, where none is visible. What runs
without a GPU: the compile gate (test_compile_gate.py) and the same numerics on the CPU.
"""

import shutil
import subprocess
import sys

import pytest
import torch

from megatron_sod.ops import (
    differentiable_divergence,
    dispatch,
    packed_step_weights,
    torch_ops,
    vocab_parallel_divergence,
)
from megatron_sod.ops.reference import reference_divergence
from tests.ops.cases import ALL_FIELDS, random_case, weighted_sum

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def compiled_library():
    assert "cuda" in dispatch.COMPILED_DEVICES, "build first: python setup.py build_ext --inplace"


def on_gpu(*tensors):
    return tuple(t.cuda() for t in tensors)


@pytest.mark.parametrize(
    "vocab, padded", [(37, 40), (1024, 1024), (2077, 2081), (151_936, 152_064)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_and_gradient_equal_the_reference(vocab, padded, dtype):
    student, teacher, targets = random_case(vocab=vocab, padded=padded, dtype=dtype, scale=1.5)
    z, y, t = on_gpu(student, teacher, targets)
    z.requires_grad_()
    options = dict(vocab_start=0, vocab_size=vocab, temperature=0.9, jsd_beta=0.4)
    stats = differentiable_divergence(z, y, t, **options)
    weighted_sum_on(stats).backward()
    x = student.double().requires_grad_()
    want = reference_divergence(
        x, teacher, targets, vocab_size=vocab, temperature=0.9, jsd_beta=0.4
    )
    weighted_sum(want).backward()
    for name in ALL_FIELDS:
        torch.testing.assert_close(
            getattr(stats, name).cpu().double(), getattr(want, name).detach(), rtol=5e-6, atol=5e-6
        )
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1e-2)
    torch.testing.assert_close(z.grad.cpu().double(), x.grad, rtol=tolerance, atol=tolerance)
    assert (z.grad[:, vocab:] == 0).all()


def weighted_sum_on(stats):
    moved = {k: None if v is None else v.cpu() for k, v in vars(stats).items()}
    return weighted_sum(type(stats)(**moved))


@pytest.mark.parametrize("world", [2, 3, 8])
def test_shards_one_after_another_equal_one_rank(world):
    """NCCL refuses two ranks on one GPU: the shards run in turn and merge as they would."""
    student, teacher, targets = random_case(vocab=1000, padded=1000, dtype=torch.bfloat16)
    z, y, t = on_gpu(student, teacher, targets)
    width = -(-1000 // world)
    partials = []
    for rank in range(world):
        columns = slice(rank * width, (rank + 1) * width)
        shard = (z[:, columns].contiguous(), y[:, columns].contiguous(), t)
        partials.append(torch.ops.sod.vp_stats(*shard, rank * width, shard[0].shape[1], 1.0))
    rows = torch.ops.sod.vp_finish(torch.stack(partials), t)
    want = reference_divergence(student, teacher, targets, vocab_size=1000)
    torch.testing.assert_close(rows[:, 2].cpu().double(), want.reverse_kl, rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(
        rows[:, 0].cpu().double(), want.student_logprobs, rtol=5e-6, atol=5e-6
    )


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_rows_off_the_16_byte_grid(offset):
    student, teacher, targets = random_case(rows=9, vocab=515, padded=515, dtype=torch.bfloat16)
    wide = torch.zeros(9, 600, dtype=torch.bfloat16, device="cuda")
    wide[:, offset : offset + 515] = student.cuda()
    z = wide[:, offset : offset + 515]
    got = vocab_parallel_divergence(
        z, teacher.cuda(), targets.cuda(), vocab_start=0, vocab_size=515
    )
    want = reference_divergence(student, teacher, targets, vocab_size=515)
    torch.testing.assert_close(got.reverse_kl.cpu().double(), want.reverse_kl, rtol=5e-6, atol=5e-6)


def test_inplace_gradient_and_repeated_bits():
    student, teacher, targets = on_gpu(*random_case(vocab=4096, padded=4224, dtype=torch.bfloat16))
    found = []
    for inplace in (False, True, True):
        leaf = student.clone().requires_grad_()
        logits = leaf.clone()
        stats = differentiable_divergence(
            logits, teacher, targets, vocab_start=0, vocab_size=4096, inplace=inplace
        )
        (stats.reverse_kl.sum() + stats.student_logprobs.sum()).backward()
        found.append((leaf.grad, stats.reverse_kl.detach()))
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


def test_a_side_stream_is_obeyed():
    student, teacher, targets = on_gpu(*random_case(vocab=4096, padded=4096, dtype=torch.bfloat16))
    options = dict(vocab_start=0, vocab_size=4096)
    want = vocab_parallel_divergence(student, teacher, targets, **options).reverse_kl
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        late = student * 1.0
        got = vocab_parallel_divergence(late, teacher, targets, **options).reverse_kl
    torch.cuda.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_step_weights_equal_the_cpu_and_repeat_their_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    tokens, rows, steps = 100_000, 32, 16
    step_ids = torch.randint(0, steps + 1, (tokens,), generator=generator).to(dtype)
    trajectory_ids = torch.arange(tokens).mul(rows).div(tokens, rounding_mode="floor").to(dtype)
    student, teacher = (-torch.rand(tokens, generator=generator) for _ in range(2))
    packed = (student, teacher, step_ids, trajectory_ids)
    want = packed_step_weights(*packed, rows, steps)
    once, twice = (packed_step_weights(*on_gpu(*packed), rows, steps) for _ in range(2))
    for a, b, w in zip(once, twice, want, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.cpu(), w, rtol=1e-5, atol=1e-6)


def test_the_pytorch_fallback_runs_on_the_gpu_too():
    student, teacher, targets = on_gpu(*random_case(dtype=torch.bfloat16))
    partials = torch_ops.vp_stats(student, teacher, targets, 0, 37, 1.0)
    compiled = torch.ops.sod.vp_stats(student, teacher, targets, 0, 37, 1.0)
    torch.testing.assert_close(
        torch_ops.vp_finish(partials[None], targets),
        torch_ops.vp_finish(compiled[None], targets),
        rtol=1e-4,
        atol=1e-4,
    )


SANITIZED = """
import torch
from megatron_sod.ops import differentiable_divergence, packed_step_weights
for vocab, padded in ((37, 40), (515, 515), (4096, 4224)):
    z = torch.randn(5, padded, device="cuda").bfloat16().requires_grad_()
    y = torch.randn(5, padded, device="cuda").bfloat16()
    t = torch.tensor([0, vocab - 1, -100, 3, 5], device="cuda")
    s = differentiable_divergence(z, y, t, vocab_start=0, vocab_size=vocab, jsd_beta=0.5)
    (s.reverse_kl + s.jsd + s.student_logprobs).sum().backward()
ids = torch.randint(0, 4, (1000,), device="cuda")
packed_step_weights(torch.rand(1000, device="cuda"), None, ids, ids * 0, 1, 3)
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer on PATH"
)
def test_compute_sanitizer_is_clean(tool):
    done = subprocess.run(
        [
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            "-c",
            SANITIZED,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
