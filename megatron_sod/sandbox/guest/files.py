"""Files of a call: written before the program, measured while it runs, read back after it."""

import errno
import json
import os
import stat

FETCH_LIMIT_BYTES = 16 << 20


def write_all(named):
    """Writes (relative path, content) pairs below the current, fresh directory."""
    for name, content in named:
        folder = os.path.dirname(name)
        if folder:
            os.makedirs(folder, exist_ok=True)
        descriptor = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
        with open(descriptor, "wb") as file:
            file.write(content)


def usage(scratch, max_files):
    """(number of entries, bytes on disk) below `scratch`; stops counting above `max_files`."""
    num_files = num_bytes = 0
    stack = [scratch]
    while stack and num_files <= max_files:
        try:
            with os.scandir(stack.pop()) as entries:
                for entry in entries:
                    num_files += 1
                    if entry.is_dir(follow_symlinks=False):
                        stack.append(entry.path)
                    else:
                        num_bytes += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return max_files + 1, num_bytes  # deeper than anything honest
            continue  # removed or closed to us meanwhile; the next look will see what is there
    return num_files, num_bytes


def _open_beneath(scratch, name):
    """A regular file below `scratch`, no link followed at any step; None when it is not one."""
    folder = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    parts = name.split("/")
    try:
        for part in parts[:-1]:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            deeper = os.open(part, flags, dir_fd=folder)
            os.close(folder)
            folder = deeper
        # O_NONBLOCK: a FIFO in the file's place must not hang the supervisor.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(parts[-1], flags, dir_fd=folder)
    except OSError:
        return None
    finally:
        os.close(folder)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


def read_all(scratch, names):
    """A memory file holding one JSON line [[name, size], ...] and then the contents."""
    found, left = [], FETCH_LIMIT_BYTES
    for name in names:
        descriptor = _open_beneath(scratch, name)
        if descriptor is None:
            continue
        with open(descriptor, "rb") as file:
            content = file.read(left + 1)
        if len(content) <= left:
            found.append((name, content))
            left -= len(content)
    descriptor = os.memfd_create("fetched")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(json.dumps([[name, len(content)] for name, content in found]).encode() + b"\n")
        for _, content in found:
            file.write(content)
    return descriptor
