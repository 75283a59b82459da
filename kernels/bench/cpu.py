"""CPU table: checks each contestant against float64 first, then times them interleaved.

One thread, bf16, V = 151,936. Processor time, not wall time, and medians over repetitions that
alternate between contestants: other work on the machine then disturbs all of them little and alike.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import baselines  # noqa: E402

from megatron_sod.ops import differentiable_divergence, vocab_parallel_divergence  # noqa: E402
from megatron_sod.ops.reference import reference_divergence  # noqa: E402

VOCAB = 151_936


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(tokens, VOCAB, generator=generator) * 2
    teacher = student + torch.randn(tokens, VOCAB, generator=generator) * 0.5
    targets = torch.randint(0, VOCAB, (tokens,), generator=generator)
    return student.bfloat16(), teacher.bfloat16(), targets


def our_forward(student, teacher, targets):
    return vocab_parallel_divergence(
        student, teacher, targets, vocab_start=0, vocab_size=VOCAB
    ).reverse_kl


def our_step(student, teacher, targets, inplace=True):
    """In place: the gradient overwrites the logits, so the caller must not need them again."""
    student = student.detach().requires_grad_()
    stats = differentiable_divergence(
        student.view_as(student), teacher, targets, vocab_start=0, vocab_size=VOCAB, inplace=inplace
    )
    stats.reverse_kl.sum().backward()
    return student.grad


def single_rank_megatron() -> None:
    """A gloo group of one, which megatron-core's cross-entropy asks for."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()


def contestants(targets: torch.Tensor) -> dict[str, tuple[Callable, Callable]]:
    """name -> (forward, forward + backward), each taking (student, teacher)."""
    single_rank_megatron()
    cross_entropy = baselines.megatron_cross_entropy(targets)
    compiled = torch.compile(baselines.eager_kl)
    plain = {
        "PyTorch eager (log_softmax + kl_div)": baselines.eager_kl,
        "torch.compile of the same": compiled,
        "sharded KL under autograd (Model-Optimizer's shape)": baselines.sharded_kl,
        "megatron-core cross-entropy (student only)": cross_entropy,
    }
    table: dict[str, tuple[Callable, Callable]] = {
        "this op": (
            lambda s, t: our_forward(s, t, targets),
            lambda s, t: our_step(s, t, targets),
        )
    }
    for name, forward in plain.items():
        table[name] = (forward, lambda s, t, f=forward: baselines.step(f, s, t))
    return table


def check(tokens: int = 2) -> list[str]:
    """Largest error of each contestant's KL and gradient; raises where one computes otherwise."""
    student, teacher, targets = inputs(tokens)
    x = student.double().requires_grad_()
    want = reference_divergence(x, teacher, targets, vocab_size=VOCAB)
    want.reverse_kl.sum().backward()
    lines = []
    for name, (forward, step) in contestants(targets).items():
        if "cross-entropy" in name:
            error = (forward(student, teacher).double() - want.student_logprobs).abs().max()
            assert error < 0.05, (name, error)  # bf16 arithmetic inside
            continue
        with torch.no_grad():
            error = (forward(student.clone(), teacher).double() - want.reverse_kl).abs().max()
        gradient = step(student.clone(), teacher).double()
        gradient_error = (gradient - x.grad).abs().max()
        assert error < 1e-4 and gradient_error < 1e-2, (name, error, gradient_error)
        lines.append(f"| {name} | {float(error):.1e} | {float(gradient_error):.1e} |")
    return lines


def timed(tokens: int, repetitions: int) -> dict[str, tuple[float, float]]:
    """name -> median ns per pair of forward, and of forward + backward."""
    student, teacher, targets = inputs(tokens)
    table = contestants(targets)
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in table}
    for repetition in range(repetitions + 1):  # the first one warms up and is dropped
        for name, (forward, step) in table.items():
            for kind, call in enumerate((forward, step)):
                logits = student.clone()  # outside the timed region: in-place calls consume it
                begin = time.process_time()
                if kind == 0:
                    with torch.no_grad():
                        call(logits, teacher)
                else:
                    call(logits, teacher)
                if repetition:
                    samples[name][kind].append(time.process_time() - begin)
    pairs = tokens * VOCAB
    return {
        name: tuple(statistics.median(times) / pairs * 1e9 for times in both)
        for name, both in samples.items()
    }


def peak_extra_bytes(which: str, tokens: int) -> int:
    """Growth of the peak resident set during one forward + backward, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", which, str(tokens)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def _peak_main(which: str, tokens: int) -> None:
    torch.set_num_threads(1)
    student, teacher, targets = inputs(tokens)
    small = inputs(1)
    step = our_step if which == "op" else lambda s, t, i: baselines.step(baselines.eager_kl, s, t)
    step(small[0].clone(), small[1], small[2])  # libraries and autograd are loaded, not counted
    # VmHWM is the peak of the whole life: raise it to the present by touching what is held now
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = _status_bytes("VmRSS")
    step(student, teacher, targets)
    print(max(0, _status_bytes("VmHWM") - before))


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        _peak_main(sys.argv[2], int(sys.argv[3]))
