"""L2, L1 and L0: no namespaces; Landlock, a dropped uid or neither. The filter comes on top."""

import os
import signal
import struct

from . import linux

# Access rights of include/uapi/linux/landlock.h, by the ABI that introduced them.
_EXECUTE, _READ_FILE, _READ_DIR = 1, 4, 8
_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_BIND_TCP_CONNECT_TCP = 3
_SCOPE_ABSTRACT_UNIX_AND_SIGNAL = 3
_FILE_RIGHTS = 1 | 2 | 4 | (1 << 14) | (1 << 15)  # the rights that mean something on a file
_WRITABLE_DEVICES = ("null", "zero", "full", "random", "urandom")


def _rights(abi):
    return sum(bits for since, bits in _RIGHTS_BY_ABI.items() if since <= abi)


def _allow(ruleset, path, access):
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(path):
            access &= _FILE_RIGHTS
        linux.landlock_allow_path(ruleset, descriptor, access)
    finally:
        os.close(descriptor)


def restrict_with_landlock(read_only, scratch):
    """Files: `read_only` and the scratch directory, nothing else. No TCP (ABI 4), no signal to
    and no abstract socket of another process (ABI 6)."""
    abi = linux.landlock_abi()
    rights = _rights(abi)
    attributes = struct.pack("=Q", rights)
    if abi >= 4:
        attributes += struct.pack("=Q", _BIND_TCP_CONNECT_TCP)
    if abi >= 6:
        attributes += struct.pack("=Q", _SCOPE_ABSTRACT_UNIX_AND_SIGNAL)
    ruleset = linux.landlock_ruleset(attributes)
    for path in read_only:
        if os.path.exists(path):
            _allow(ruleset, path, _EXECUTE | _READ_FILE | _READ_DIR)
    for name in _WRITABLE_DEVICES:
        _allow(ruleset, f"/dev/{name}", _READ_FILE | 2)
    _allow(ruleset, scratch, rights)
    linux.landlock_restrict(ruleset)
    os.close(ruleset)


def isolate_call(config, slot):
    """In the call's supervisor: an empty scratch directory of the slot's user. Returns it."""
    linux.become_subreaper()
    linux.die_with_parent(signal.SIGTERM)  # its handler ends the tree first
    linux.set_dumpable(False)
    scratch = f"{config['scratch_base']}/{slot}"
    os.mkdir(scratch, 0o700)
    if config["uids"]:
        os.chown(scratch, config["uids"][slot], config["uids"][slot])
    return scratch


def enter_guest(config, slot, scratch):
    """In the program's process: the slot's uid, then Landlock (both where the level has them).

    "kept_capability": set where the interpreter lies below a directory only root may enter. The
    program may then pass closed directories, and Landlock's list alone decides what it can open.
    """
    if config["uids"]:
        uid = config["uids"][slot]
        linux.keep_capabilities_on_uid_change()
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        linux.drop_capabilities(config["kept_capability"])
        linux.die_with_parent(signal.SIGKILL)
    linux.set_dumpable(True)
    linux.no_new_privileges()
    if config["landlock"]:
        restrict_with_landlock(config["binds"].values(), scratch)


def remove_scratch(scratch):
    """Deletes what the program left; its processes are dead. Follows no link and needs no
    recursion: subdirectories are moved up to the top, so any depth is emptied level by level."""
    number = 0
    folders = [scratch]
    while folders:
        folder = folders.pop()
        os.chmod(folder, 0o700)
        with os.scandir(folder) as entries:
            for entry in list(entries):
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, 0o700)
                    number += 1
                    target = f"{scratch}.{number}"
                    os.rename(entry.path, target)
                    folders.append(target)
                else:
                    os.unlink(entry.path)
        os.rmdir(folder)
