"""How far the student is from the teacher, per step of a trajectory.

B sequences, S sequence length, T packed tokens, N trajectories, K steps.
Step ids: 0 = not written by the student (prompt, tool output, padding); 1..K = the turn.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def step_divergence(
    student_logprobs_BS: torch.Tensor,
    teacher_logprobs_BS: torch.Tensor,
    step_ids_BS: torch.Tensor,
    *,
    max_steps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean absolute log-ratio of the sampled tokens, per step.

    d_k = (1 / n_k) * sum over the tokens of step k of |log pi_student - log pi_teacher|

    Args:
        student_logprobs_BS: [B, S] float, nats.
        teacher_logprobs_BS: [B, S] float, nats.
        step_ids_BS: [B, S] integer; 0 = not the student's, 1..K = step.
        max_steps: K; read from the ids when None (one device synchronisation).
    Returns:
        d_BK: [B, K] float32 (float64 when both logprobs are), 0 where not valid.
        valid_BK: [B, K] bool; False on padding, on steps without a counted token, and on every
            step of a trajectory with a counted logprob that is not finite.
    Raises:
        ValueError: shapes differ, or a step id is outside 0..max_steps.
    Distributed: no communication.
    Source: arXiv 2605.07725 Eq. 6.
    """
    if not (student_logprobs_BS.shape == teacher_logprobs_BS.shape == step_ids_BS.shape):
        raise ValueError(
            "student logprobs, teacher logprobs and step ids must have one shape; got "
            f"{tuple(student_logprobs_BS.shape)}, {tuple(teacher_logprobs_BS.shape)} and "
            f"{tuple(step_ids_BS.shape)}"
        )
    num_sequences, length = step_ids_BS.shape
    if max_steps is None:
        max_steps = int(step_ids_BS.max()) if step_ids_BS.numel() else 0
    gap_T = (student_logprobs_BS.detach() - teacher_logprobs_BS.detach()).abs().reshape(-1)
    rows_T = torch.arange(num_sequences, device=step_ids_BS.device).repeat_interleave(length)
    d_BK, counts_BK = packed_step_divergence(
        gap_T, step_ids_BS.reshape(-1), rows_T, num_sequences, max_steps
    )
    valid_BK = valid_steps(d_BK, counts_BK)
    return torch.where(valid_BK, d_BK, torch.zeros_like(d_BK)), valid_BK


def segment_sums(
    values_T: torch.Tensor, keys_T: torch.Tensor, num_segments: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 sum and token count per segment, in token order, without float atomics.

    Args:
        values_T: [T] float.
        keys_T: [T] int64; negative = not counted, else 0..num_segments-1.
    Returns:
        sums [num_segments] float64 and counts [num_segments] float64.
    """
    keep_T = keys_T >= 0
    slots_T = torch.where(keep_T, keys_T, torch.full_like(keys_T, num_segments))
    values_T = torch.where(keep_T, values_T.double(), 0.0)
    if not values_T.is_cuda:  # the CPU's index_add walks the tokens in order
        sums = values_T.new_zeros(num_segments + 1).index_add_(0, slots_T, values_T)
        counts = torch.bincount(slots_T, minlength=num_segments + 1)
        return sums[:num_segments], counts[:num_segments].double()
    # CUDA's index_add uses atomics, whose order changes between runs: sort, then reduce runs.
    order_T = torch.argsort(slots_T, stable=True)
    counts = torch.bincount(slots_T, minlength=num_segments + 1)
    sums = torch.segment_reduce(values_T[order_T], "sum", lengths=counts, initial=0.0)
    return sums[:num_segments], counts[:num_segments].double()


def packed_step_divergence(
    values_T: torch.Tensor,
    step_ids_T: torch.Tensor,
    trajectory_ids_T: torch.Tensor,
    num_trajectories: int,
    max_steps: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of a per-token value over each step of each trajectory, for packed sequences.

    Ids, not offsets, name the segments, so a step may be cut anywhere: between packed rows and,
    with `group`, between context-parallel ranks.

    Args:
        values_T: [T] float, nats, e.g. |log-ratio| or the token's reverse KL.
        step_ids_T: [T] integer, 0 = not counted, 1..max_steps.
        trajectory_ids_T: [T] integer, 0..num_trajectories-1 wherever step_ids_T > 0.
        group: ranks that hold other tokens of the same trajectories (context parallel), or None.
    Returns:
        d_NK: [N, K] mean value, float32 (float64 for float64 values); 0 where the count is 0.
        counts_NK: [N, K] float64 number of counted tokens, over all ranks of `group`.
    Raises:
        ValueError: shapes differ, or an id is out of range (checked on CPU tensors only: on a
            GPU the check would wait for the device).
    Distributed: one all-reduce of [N * K, 2] float64 over `group`; none without it.
    """
    if not (values_T.shape == step_ids_T.shape == trajectory_ids_T.shape):
        raise ValueError(
            f"values, step ids and trajectory ids must have one shape; got {tuple(values_T.shape)},"
            f" {tuple(step_ids_T.shape)} and {tuple(trajectory_ids_T.shape)}"
        )
    keys_T = step_keys(step_ids_T, trajectory_ids_T, num_trajectories, max_steps)
    sums, counts = segment_sums(values_T.detach(), keys_T, num_trajectories * max_steps)
    if group is not None and dist.get_world_size(group) > 1:
        both = torch.stack([sums, counts])
        dist.all_reduce(both, group=group)
        sums, counts = both[0], both[1]
    d = sums / counts.clamp_min(1.0)
    dtype = torch.float64 if values_T.dtype == torch.float64 else torch.float32
    shape = (num_trajectories, max_steps)
    return d.to(dtype).reshape(shape), counts.reshape(shape)


def step_keys(
    step_ids_T: torch.Tensor, trajectory_ids_T: torch.Tensor, num_trajectories: int, max_steps: int
) -> torch.Tensor:
    """[T] int64: trajectory * max_steps + step - 1, or -1 on tokens that are not counted."""
    if not step_ids_T.is_cuda and step_ids_T.numel():
        low, high = torch.aminmax(step_ids_T)
        counted = trajectory_ids_T[step_ids_T > 0]
        first, last = torch.aminmax(counted) if counted.numel() else (0, 0)
        if int(low) < 0 or int(high) > max_steps:
            raise ValueError(
                f"step ids must lie in 0..{max_steps}; found {int(low)}..{int(high)}: "
                "raise max_steps, or mark uncounted tokens with 0"
            )
        if int(first) < 0 or int(last) >= max(num_trajectories, 1):
            raise ValueError(
                f"trajectory ids of counted tokens must lie in 0..{num_trajectories - 1}; found "
                f"{int(first)}..{int(last)}"
            )
    keys_T = trajectory_ids_T.long() * max_steps + step_ids_T.long() - 1
    return torch.where(step_ids_T > 0, keys_T, torch.full_like(keys_T, -1))


def valid_steps(d_NK: torch.Tensor, counts_NK: torch.Tensor) -> torch.Tensor:
    """[N, K] bool: the step has a counted token and its trajectory has no value that is not finite.

    One NaN makes every later ratio of its trajectory meaningless, so the whole trajectory goes.
    """
    usable_N1 = torch.isfinite(d_NK).all(dim=1, keepdim=True)
    return (counts_NK > 0) & usable_N1


def quantile_over_ranks(
    values: torch.Tensor, q: float, group: dist.ProcessGroup | None = None
) -> float | None:
    """The q-quantile (linear interpolation) of the values of all ranks; None without any.

    Args:
        values: [any] float64 on this rank; sizes may differ between ranks.
        group: data-parallel ranks, or None.
    Distributed: two all-gathers over `group`; none without it.
    """
    values = values.double()
    if group is not None and dist.get_world_size(group) > 1:
        size = torch.tensor([values.numel()], device=values.device)
        sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, size, group=group)
        padded = values.new_zeros(max(int(s) for s in sizes))
        padded[: values.numel()] = values
        rows = [torch.zeros_like(padded) for _ in sizes]
        dist.all_gather(rows, padded, group=group)
        values = torch.cat([row[: int(s)] for row, s in zip(rows, sizes, strict=True)])
    return float(torch.quantile(values, q)) if values.numel() else None


def token_weights(
    w_NK: torch.Tensor, step_ids_T: torch.Tensor, trajectory_ids_T: torch.Tensor
) -> torch.Tensor:
    """[T] each token's step weight; exactly 0 on tokens that are not counted."""
    if w_NK.numel() == 0:
        return w_NK.new_zeros(step_ids_T.shape)
    counted_T = step_ids_T > 0
    flat_T = trajectory_ids_T.long() * w_NK.shape[1] + step_ids_T.long() - 1
    picked_T = w_NK.reshape(-1)[torch.where(counted_T, flat_T, torch.zeros_like(flat_T))]
    return torch.where(counted_T, picked_T, torch.zeros_like(picked_T))
