"""What every kind of sandbox demands of a program and of file names before anything runs."""


def source_bytes(code):
    """(the program as bytes, None), or (None, why it cannot be run by any interpreter).

    Raises:
        TypeError: code is not text; the caller took it from a tool call without looking.
    """
    if not isinstance(code, str):
        raise TypeError(f"code must be str, got {type(code).__name__}")
    if "\0" in code:  # CPython before 3.12 silently runs what precedes it
        return None, "source code cannot contain null bytes"
    try:
        return code.encode("utf-8"), None
    except UnicodeEncodeError:
        return None, "source code cannot contain surrogates"


def check_name(name):
    """The name, if it stays below the scratch directory. Raises ValueError."""
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or any(p in ("", ".", "..") or "\0" in p or len(p) > 255 for p in parts):
        raise ValueError(f"file name {name!r} must be a relative path without '.' or '..'")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"file name {name!r} is not valid UTF-8") from None
    return name


def check_files(files):
    """[(name, bytes)] of {name: bytes}. Raises ValueError for a name that leaves the scratch, or
    that is both a file and a directory."""
    named = [(check_name(name), bytes(content)) for name, content in (files or {}).items()]
    names = {name for name, _ in named}
    for name in names:
        for end in (i for i, letter in enumerate(name) if letter == "/"):
            if name[:end] in names:
                raise ValueError(f"file {name[:end]!r} is also the directory of {name!r}")
    return named
