"""The system-call filter of every level above L0, as bytes of classic BPF.

A list of what is refused, not of what is allowed: numerical libraries must keep working on kernels
newer than this file. libseccomp (through pyseccomp) assembles it; where the library is missing an
assembler for x86_64 and aarch64 does. The same rules feed both, and a test runs both.
"""

import errno
import platform
import struct
import tempfile

from .seccomp_numbers import AUDIT_ARCHITECTURE, NUMBERS

# Other processes, the kernel's configuration, namespaces, mounts, devices, keys, kernel memory.
_REFUSED = """
ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp process_madvise process_mrelease
setns unshare chroot pivot_root mount umount2 move_mount open_tree fsopen fsconfig fsmount fspick
mount_setattr swapon swapoff quotactl quotactl_fd acct
reboot kexec_load kexec_file_load init_module finit_module delete_module syslog
settimeofday clock_settime adjtimex clock_adjtime sethostname setdomainname vhangup personality
bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register
keyctl add_key request_key open_by_handle_at name_to_handle_at fanotify_init inotify_add_watch
move_pages migrate_pages iopl ioperm modify_ldt lookup_dcookie
""".split()
# System V and POSIX queues and segments outlive their processes where there is no IPC namespace.
_REFUSED += "shmget shmat shmctl msgget msgsnd msgrcv msgctl semget semop semctl".split()
_REFUSED += "semtimedop mq_open mq_unlink".split()
# Memory that no rlimit and no resident-size watch sees; programs fall back on ENOSYS.
_MISSING = ["clone3", "memfd_create", "memfd_secret"]
# Metadata of files that the host user owns; Landlock does not cover it.
_METADATA = """
chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes futimesat utimensat
setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr setxattrat removexattrat
file_setattr
""".split()
# No socket at all but a connected stream pair. A datagram pair could be pointed at a socket of the
# host (connect, sendto), which neither a closed socket(2) nor Landlock prevents.
_NETWORK = "socket connect bind listen accept accept4".split()
_NAMESPACE_BITS = (0x80, 1 << 17, *(1 << bit for bit in range(25, 31)))
_SELF = 0x5E1F0000  # stands for the program's pid until it is known
# name, argument, test, value; tests: "ne" (differs), "eq" (equals), "any" (shares a bit).
_CONDITIONAL = [
    *(("clone", 0, "any", bit) for bit in _NAMESPACE_BITS),
    ("prlimit64", 0, "ne", 0),
    *((f"sched_{name}", 0, "ne", 0) for name in ("setaffinity", "setscheduler", "setparam")),
    ("sched_setattr", 0, "ne", 0),
    ("setpriority", 1, "ne", 0),
    ("ioprio_set", 1, "ne", 0),
    ("ioctl", 1, "eq", 0x5412),  # TIOCSTI types into a terminal
    ("ioctl", 1, "eq", 0x541C),  # TIOCLINUX
    ("socketpair", 1, "any", 2),  # SOCK_DGRAM and SOCK_RAW; SOCK_STREAM is 1, SOCK_SEQPACKET 5
    ("prctl", 0, "eq", 1),  # PR_SET_PDEATHSIG: the program must die with its supervisor
]
_SIGNALS_TO_SELF = [
    *((name, 0, "ne", _SELF) for name in ("kill", "tgkill", "rt_sigqueueinfo")),
    ("rt_tgsigqueueinfo", 0, "ne", _SELF),
    *(("fcntl", 1, "eq", command) for command in (8, 10, 15)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX
    *(("ioctl", 1, "eq", request) for request in (0x8901, 0x8902)),  # FIOSETOWN, SIOCSPGRP
]


def _rules(keep_metadata, only_signal_self):
    """(name, errno, condition or None) for every refused call."""
    rules: list[tuple] = [(name, errno.EPERM, None) for name in _REFUSED]
    rules += [(name, errno.ENOSYS, None) for name in _MISSING]
    rules += [(name, errno.EACCES, None) for name in _NETWORK]
    rules += [(name, errno.EPERM, tuple(rest)) for name, *rest in _CONDITIONAL]
    if keep_metadata:
        rules += [(name, errno.EPERM, None) for name in _METADATA]
    if only_signal_self:
        rules += [(name, errno.EPERM, tuple(rest)) for name, *rest in _SIGNALS_TO_SELF]
        rules += [(name, errno.EPERM, None) for name in ("tkill", "pidfd_send_signal")]
    return rules


def build_filter(keep_metadata=False, only_signal_self=False, use_library=True):
    """The filter's bytes and the name of what assembled it.

    Args:
        keep_metadata: refuse chmod, chown, utime and xattr calls (the guest has the host's uid).
        only_signal_self: refuse signals to other processes (nothing else contains them); the
            program puts its pid in place of `own_pid_marker`.
        use_library: False skips libseccomp.
    Raises:
        OSError: no libseccomp, and an architecture the built-in assembler does not know.
    """
    rules = _rules(keep_metadata, only_signal_self)
    if use_library:
        try:
            return _assemble_with_library(rules), "libseccomp"
        except (ImportError, OSError, RuntimeError):
            pass  # pyseccomp or libseccomp.so.2 is not installed
    return assemble(rules), "built-in"


def _assemble_with_library(rules):
    import pyseccomp

    policy = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name, code, condition in rules:
        number = _number(pyseccomp, name)
        if number is not None:
            arguments = [] if condition is None else [_library_argument(pyseccomp, *condition)]
            policy.add_rule(pyseccomp.ERRNO(code), number, *arguments)
    with tempfile.TemporaryFile() as file:
        policy.export_bpf(file)
        file.seek(0)
        return file.read()


def _number(library, name):
    """The number here; None for a call this architecture does not have."""
    known = NUMBERS.get(platform.machine())
    if known is not None:  # a libseccomp older than the kernel does not know its newest calls
        return known.get(name)
    try:
        return library.resolve_syscall(library.Arch.NATIVE, name)
    except ValueError:
        return None


def _library_argument(library, index, test, value):
    if test == "ne":
        return library.Arg(index, library.NE, value)
    # The kernel reads 32 bits here; a comparison of all 64 could be dodged with the upper ones.
    mask = 0xFFFFFFFF if test == "eq" else value
    return library.Arg(index, library.MASKED_EQ, mask, value)


def assemble(rules, machine=None):
    """Classic BPF for x86_64 or aarch64, without a library.

    Layout: refuse a foreign architecture, refuse x32 numbers, then one comparison per rule.
    """
    machine = machine or platform.machine()
    if machine not in NUMBERS:
        raise OSError(errno.ENOSYS, f"no system-call filter for {machine}: install libseccomp.so.2")
    load, equal, at_least, any_bit, leave = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x00050000
    numbers = NUMBERS[machine]
    code = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCHITECTURE[machine]), (leave, 0, 0, kill)]
    code.append((load, 0, 0, 0))
    code += [(at_least, 0, 1, 0x40000000), (leave, 0, 0, refuse | errno.ENOSYS)]
    for name, error, condition in rules:
        if name not in numbers:
            continue
        if condition is None:
            code += [(equal, 0, 1, numbers[name]), (leave, 0, 0, refuse | error)]
            continue
        index, test, value = condition
        jump = any_bit if test == "any" else equal
        skip = (1, 0) if test == "ne" else (0, 1)
        code += [
            (equal, 0, 4, numbers[name]),
            (load, 0, 0, 16 + 8 * index),  # the low half of a little-endian argument
            (jump, *skip, value),
            (leave, 0, 0, refuse | error),
            (load, 0, 0, 0),
        ]
    code.append((leave, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def own_pid_marker():
    """The bytes that stand for the program's pid in a filter built with only_signal_self."""
    return struct.pack("=I", _SELF)
