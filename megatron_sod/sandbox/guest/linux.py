"""Linux system calls that the standard library does not offer, through libc.

Every wrapper raises OSError with the call's name. x86_64 and aarch64 only where a raw number is
needed (numbers: the kernel's arch/*/include/generated/uapi/asm/unistd*.h).
"""

import ctypes
import os
import platform
import signal
import struct

# PyDLL keeps the GIL: after a raw clone the child must not wait for a lock nobody will release.
_libc = ctypes.PyDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x08000000, 0x10000000, 0x20000000
CLONE_NEWNET = 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND = 1, 2, 4, 8, 4096
MS_REMOUNT, MS_REC, MS_PRIVATE = 32, 16384, 1 << 18
MNT_DETACH = 2
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 36, 38, 22
_PR_SET_KEEPCAPS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 8, 47, 2
_SECCOMP_MODE_FILTER = 2
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
_NUMBERS = {"x86_64": {"clone": 56, "pivot_root": 155}, "aarch64": {"clone": 220, "pivot_root": 41}}
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446


def _number(name):
    try:
        return _NUMBERS[platform.machine()][name]
    except KeyError:
        raise OSError(38, f"no {name} number known for {platform.machine()}") from None


def _check(name, value):
    if value < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return value


def _syscall(name, number, *arguments):
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(name, _libc.syscall(ctypes.c_long(number), *words))


def clone(flags):
    """A fork whose child starts in new namespaces. Returns 0 in the child, its pid in the parent.

    Only for a single-threaded caller: libc's own fork handlers do not run.
    """
    return _syscall("clone", _number("clone"), flags | signal.SIGCHLD, 0, 0, 0, 0)


def unshare(flags):
    _check("unshare", _libc.unshare(ctypes.c_int(flags)))


def mount(source, target, kind, flags, data=None):
    texts = [os.fsencode(t) if t is not None else None for t in (source, target, kind)]
    options = data.encode() if data is not None else None
    value = _libc.mount(*texts, ctypes.c_ulong(flags), options)
    _check(f"mount {kind or source} on {target}", value)


def unmount(target):
    _check(f"umount {target}", _libc.umount2(os.fsencode(target), ctypes.c_int(MNT_DETACH)))


def pivot_root(new_root, put_old):
    paths = os.fsencode(new_root), os.fsencode(put_old)
    _syscall("pivot_root", _number("pivot_root"), *paths)


def make_tree_read_only(path):
    """Read-only and nosuid for every mount at and below `path` (mount_setattr, Linux 5.12)."""
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    arguments = (_AT_FDCWD, os.fsencode(path), _AT_RECURSIVE, attributes, len(attributes))
    _syscall("mount_setattr", _MOUNT_SETATTR, *arguments)


def _prctl(name, option, *values):
    words = [ctypes.c_ulong(v) for v in (*values, 0, 0, 0, 0)[:4]]
    _check(f"prctl {name}", _libc.prctl(ctypes.c_int(option), *words))


def die_with_parent(signal_number):
    """This process gets the signal when the thread that forked it ends; cleared by a uid change."""
    _prctl("PDEATHSIG", _PR_SET_PDEATHSIG, signal_number)


def set_dumpable(is_dumpable):
    """False keeps /proc/<pid>/{mem,environ,...} of this process from others of the same uid."""
    _prctl("DUMPABLE", _PR_SET_DUMPABLE, int(is_dumpable))


def become_subreaper():
    """Orphans below this process become its children, so that they can be found and killed."""
    _prctl("CHILD_SUBREAPER", _PR_SET_CHILD_SUBREAPER, 1)


def no_new_privileges():
    _prctl("NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)


def keep_capabilities_on_uid_change():
    """The permitted set outlives a uid change; the effective one does not."""
    _prctl("KEEPCAPS", _PR_SET_KEEPCAPS, 1)


def drop_capabilities(kept=None):
    """Empties the bounding, inheritable, permitted and effective sets, but for one capability,
    which programs started from here keep too."""
    for capability in range(64):
        try:
            if capability != kept:
                _prctl("CAPBSET_DROP", _PR_CAPBSET_DROP, capability)
        except OSError:
            break  # EINVAL past the last capability of this kernel; EPERM when there is none left
    mask = 0 if kept is None else 1 << kept
    header = struct.pack("=Ii", 0x20080522, 0)
    _check("capset", _libc.capset(header, struct.pack("=6I", mask, mask, mask, 0, 0, 0)))
    if kept is not None:
        _prctl("CAP_AMBIENT", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, kept)


def install_seccomp(program):
    """Installs a classic-BPF filter given as bytes of struct sock_filter (8 bytes each)."""
    code = ctypes.create_string_buffer(program, len(program))
    length = len(program) // 8
    packed = struct.pack("@HxxxxxxP", length, ctypes.addressof(code))
    prog = ctypes.create_string_buffer(packed, len(packed))
    _prctl("SECCOMP", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(prog))


def landlock_abi():
    """Landlock's version on this kernel; 0 where there is none."""
    try:
        return _syscall("landlock_create_ruleset", _LANDLOCK_CREATE, 0, 0, 1)
    except OSError:
        return 0


def landlock_ruleset(attributes):
    return _syscall(
        "landlock_create_ruleset", _LANDLOCK_CREATE, bytes(attributes), len(attributes), 0
    )


def landlock_allow_path(ruleset, path_fd, access):
    rule = struct.pack("=Qi", access, path_fd)
    _syscall("landlock_add_rule", _LANDLOCK_ADD, ruleset, 1, rule, 0)


def landlock_restrict(ruleset):
    _syscall("landlock_restrict_self", _LANDLOCK_RESTRICT, ruleset, 0)
