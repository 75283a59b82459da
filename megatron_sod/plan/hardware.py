"""The machines a plan can be made for, and how much of their peak a run is assumed to reach.

Peaks are the vendor's data-sheet values (dense bfloat16, one direction of a link); memory is what
the driver reports. Efficiencies are assumptions of this project, stated here once; none has been
measured on these machines by it. `Hardware.scaled` replaces them with measured ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

TERA, GIGA = 1e12, 1e9
MIB = 2**20


@dataclass(frozen=True)
class Hardware:
    """One accelerator and its links; per GPU and one direction."""

    name: str
    memory_bytes: int | None  # None: not checked
    peak_flops: float  # dense bfloat16, per second
    memory_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second, to a GPU of the same node
    network_bandwidth: float  # bytes per second, to another node
    source: str
    train_efficiency: float = 0.40  # of peak_flops, forward and backward passes
    prefill_efficiency: float = 0.40  # of peak_flops, engine prefill and scoring
    decode_efficiency: float = 0.60  # of memory_bandwidth, weights and KV cache read per step
    link_efficiency: float = 0.70  # of either link
    decode_overhead_s: float = 3e-3  # per decode step: scheduling, launches
    decode_sequence_s: float = 10e-6  # per sequence in it: scheduling, sampling, detokenising
    train_overhead_s: float = 0.0  # per optimizer step
    score_overhead_s: float = 0.0  # per iteration
    transfer_overhead_s: float = 0.2  # per iteration: draining, calls to the engines, canaries

    def scaled(self, **measured: float) -> Hardware:
        """The same machine with measured constants."""
        return replace(self, **measured)  # type: ignore[arg-type]


# 400 Gb/s of network for each GPU, as in the vendor's reference designs; 200 Gb/s for the A100's.
_TABLE = (
    Hardware("a100-80gb", 81_920 * MIB, 312 * TERA, 2.039e12, 300e9, 25e9, "A100 SXM data sheet"),
    Hardware("h100-80gb", 81_559 * MIB, 989 * TERA, 3.35e12, 450e9, 50e9, "H100 SXM data sheet"),
    Hardware("h200-141gb", 143_771 * MIB, 989 * TERA, 4.8e12, 450e9, 50e9, "H200 SXM data sheet"),
    Hardware("h20-96gb", 97_871 * MIB, 148 * TERA, 4.0e12, 450e9, 50e9, "H20 data sheet"),
    Hardware("b200-180gb", 183_359 * MIB, 2250 * TERA, 8.0e12, 900e9, 50e9, "HGX B200 data sheet"),
    # One core of a server processor; a stand-in until a run has been measured.
    Hardware(
        "cpu",
        None,
        0.05 * TERA,
        10 * GIGA,
        5 * GIGA,
        1 * GIGA,
        "a guess",
        decode_overhead_s=5e-3,
        decode_sequence_s=2e-4,
    ),
)
HARDWARE = {hardware.name: hardware for hardware in _TABLE}

# Held by the CUDA context, NCCL's buffers and the allocator's fragmentation on each GPU.
RESERVE_BYTES = 4 * 2**30
