"""Runs a command as default Docker would: its capabilities, and no namespaces or mounts.

    python -m tests.sandbox.container COMMAND...        (as root)

Modelled on moby's default seccomp profile: unshare, setns, mount and clone with a namespace flag
need CAP_SYS_ADMIN there, clone3 does not exist, Landlock and seccomp are allowed.
"""

import ctypes
import errno
import os
import sys

from megatron_sod.sandbox import seccomp
from megatron_sod.sandbox.guest import linux

DOCKER_CAPABILITIES = 0xA80425FB
_REFUSED = (
    "unshare setns mount umount2 pivot_root move_mount open_tree mount_setattr fsopen".split()
)


def enter():
    rules = [(name, errno.EPERM, None) for name in _REFUSED] + [("clone3", errno.ENOSYS, None)]
    rules += [("clone", errno.EPERM, (0, "any", bit)) for bit in seccomp._NAMESPACE_BITS]
    linux.install_seccomp(seccomp.assemble(rules))  # CAP_SYS_ADMIN is still there
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(41):
        if not DOCKER_CAPABILITIES >> capability & 1:
            libc.prctl(24, capability, 0, 0, 0)


if __name__ == "__main__":
    enter()
    os.execvp(sys.argv[1], sys.argv[1:])
