"""L3: user, mount, pid, network, IPC, UTS and cgroup namespaces.

The zygote builds one read-only root and pivots into it; each call then gets its own user, mount,
pid and IPC namespace with fresh /proc, /sandbox and /dev/shm, all gone when its init ends.
"""

import os
import signal

from . import linux

GUEST_UID = 1000
WORK = "/sandbox"
_DEVICES = ("null", "zero", "full", "random", "urandom")
_QUIET = linux.MS_NOSUID | linux.MS_NODEV
_ZYGOTE_FLAGS = (
    linux.CLONE_NEWUSER
    | linux.CLONE_NEWNS
    | linux.CLONE_NEWNET
    | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUTS
    | linux.CLONE_NEWCGROUP
)
_CALL_FLAGS = linux.CLONE_NEWUSER | linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWIPC


def _write(path, text):
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _map_ids(outer_uid, outer_gid):
    """Maps GUEST_UID onto one outer id. /proc/self/*_map belong to root unless dumpable."""
    linux.set_dumpable(True)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{GUEST_UID} {outer_uid} 1")
    _write("/proc/self/gid_map", f"{GUEST_UID} {outer_gid} 1")


def _covered(path, binds):
    return any(path == b or path.startswith(b + "/") for b in binds)


def _bind(path, source, root):
    target = root + path
    if os.path.isdir(source):
        os.makedirs(target, mode=0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    linux.mount(source, target, None, linux.MS_BIND | linux.MS_REC)


def _fill_root(root, old, config):
    """Directories, links and binds of the new root; `old` is where the host's root still is."""
    for link, target in config["links"]:
        os.symlink(target, root + link)
    if any(path == WORK or path.startswith(WORK + "/") for path in config["binds"]):
        raise OSError(f"{WORK} holds the interpreter; each run's scratch would hide it")
    done: list[str] = []
    for path, source in sorted(config["binds"].items()):
        if not _covered(path, done):
            _bind(path, old + source, root)
            done.append(path)
    for name in ("dev/shm", "proc", "sandbox", "etc"):
        os.makedirs(f"{root}/{name}", mode=0o755, exist_ok=True)
    for name in _DEVICES:
        _bind(f"/dev/{name}", f"{old}/dev/{name}", root)
    os.symlink("/proc/self/fd", f"{root}/dev/fd")
    user = f"sandbox:x:{GUEST_UID}:{GUEST_UID}:sandbox:{WORK}:/bin/sh\n"
    for name, text in (("passwd", user), ("group", f"sandbox:x:{GUEST_UID}:\n")):
        with open(f"{root}/etc/{name}", "w") as file:
            file.write(text)


def _change_root(config):
    """Pivots into a read-only root made of binds. /tmp is only the place to stand on meanwhile:
    the first pivot hides nothing, so a source below /tmp can still be bound."""
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("tmpfs", "/tmp", "tmpfs", _QUIET, "mode=0755,size=4m,nr_inodes=4096")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    linux.pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    linux.mount("tmpfs", "/new", "tmpfs", _QUIET, "mode=0755,size=4m,nr_inodes=4096")
    _fill_root("/new", "/old", config)
    linux.make_tree_read_only("/new")
    # After it, for the id maps are written below /proc; each call covers it with its own.
    linux.mount("/old/proc", "/new/proc", None, linux.MS_BIND | linux.MS_REC)
    os.mkdir("/put")
    # pivot_root(".", ".") stacks the old root on the new one; detaching it leaves only the new.
    os.chdir("/new")
    linux.pivot_root(".", ".")
    linux.unmount(".")
    os.chdir("/")


def isolate_zygote(config):
    """Moves this process into its own root and namespaces, as an unprivileged user.

    As root the root is built first and the uid dropped then: an interpreter below /root stays
    reachable through its bind, and the zygote keeps no power over the host.
    """
    if config["uid"] is not None:
        linux.unshare(linux.CLONE_NEWNS)
        _change_root(config)
        os.setgroups([])
        os.setresgid(config["uid"], config["uid"], config["uid"])
        os.setresuid(config["uid"], config["uid"], config["uid"])
        uid = gid = config["uid"]
        linux.unshare(_ZYGOTE_FLAGS)
        _map_ids(uid, gid)
    else:
        uid, gid = os.getuid(), os.getgid()
        linux.unshare(_ZYGOTE_FLAGS)
        _map_ids(uid, gid)
        _change_root(config)
    linux.no_new_privileges()


def spawn_supervisor():
    """Forks the init of a call's namespaces. Returns 0 in it, its pid (as the host sees) here."""
    return linux.clone(_CALL_FLAGS)


def isolate_call(limits):
    """In the call's init: ids, scratch, /proc; then every capability is gone."""
    linux.die_with_parent(signal.SIGKILL)
    _map_ids(GUEST_UID, GUEST_UID)
    quota = f"size={limits['scratch_bytes']},nr_inodes={limits['scratch_files']},mode=0700"
    linux.mount("tmpfs", WORK, "tmpfs", _QUIET, quota)
    shm = f"size={limits['shm_bytes']},nr_inodes=256,mode=0700"
    linux.mount("tmpfs", "/dev/shm", "tmpfs", _QUIET | linux.MS_NOEXEC, shm)
    _fresh_proc()
    linux.set_dumpable(False)
    linux.drop_capabilities()
    return WORK


def _fresh_proc():
    """A /proc of this pid namespace. Where a container masks parts of /proc the kernel refuses,
    and an empty directory is the safe substitute."""
    try:
        linux.mount("proc", "/proc", "proc", _QUIET | linux.MS_NOEXEC | linux.MS_RDONLY)
    except OSError:
        linux.mount("tmpfs", "/proc", "tmpfs", _QUIET | linux.MS_NOEXEC, "size=4k,nr_inodes=2")


def enter_guest():
    """In the program's process: nothing left to give up, but /proc/self must be readable."""
    linux.set_dumpable(True)
