"""Which implementation serves: compiled where a library was built for the device, else PyTorch.

SOD_OPS_IMPL=reference forces PyTorch; SOD_OPS_IMPL=compiled refuses to go without a library.
Read once, at import.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import ModuleType

import torch

from megatron_sod.errors import OpError
from megatron_sod.ops import compiled, registration, torch_ops

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent


def _load(device: str) -> bool:
    """Load this device's library; False, with one line, where there is none to load."""
    for path in sorted(FOLDER.glob(f"_sod_{device}*.so")):
        try:
            torch.ops.load_library(str(path))
            return True
        except OSError as error:
            log.warning("%s cannot be loaded (%s); PyTorch serves instead", path.name, error)
    return False


def _choose() -> frozenset[str]:
    """Device types served by a compiled library."""
    wanted = os.environ.get("SOD_OPS_IMPL", "")
    if wanted not in ("", "reference", "compiled"):
        raise OpError(f"SOD_OPS_IMPL must be reference or compiled; got {wanted!r}")
    devices = ["cpu"] + (["cuda"] if torch.version.cuda else [])
    served = frozenset() if wanted == "reference" else frozenset(d for d in devices if _load(d))
    missing = [d for d in devices if d not in served]
    if missing and wanted == "compiled":
        raise OpError(
            f"SOD_OPS_IMPL=compiled, but no library serves {', '.join(missing)}; build with "
            "`python setup.py build_ext --inplace`"
        )
    if missing and not wanted:
        log.warning(
            "no compiled library for %s: the op runs in PyTorch, several times slower; build with "
            "`python setup.py build_ext --inplace`",
            ", ".join(missing),
        )
    for device in ("cpu", "cuda"):
        if device not in served:
            registration.implement_in_torch(device.upper())
    return served


COMPILED_DEVICES = _choose()


def implementation_for(tensor: torch.Tensor) -> ModuleType:
    """The module whose vp_stats / vp_finish / vp_second / vp_grad_ serve this tensor's device."""
    return compiled if tensor.device.type in COMPILED_DEVICES else torch_ops


def installed_implementations(device: str) -> dict[str, ModuleType]:
    """Every implementation that can run on this device, by name; the first is the one in use."""
    found = {"compiled": compiled} if device in COMPILED_DEVICES else {}
    return {**found, "reference": torch_ops}
