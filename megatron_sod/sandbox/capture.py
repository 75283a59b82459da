"""Reads a running program's streams without ever blocking it, keeping head and tail."""


class Stream:
    """One output stream: every byte is taken, `limit_bytes` of them are kept.

    Half of them from the start, half from the end, so that both the first result and the last
    line of a traceback survive a flood in between.
    """

    def __init__(self, limit_bytes):
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self._head = bytearray()
        self._tail = bytearray()

    def add(self, data):
        self.num_bytes += len(data)
        room = self.limit_bytes - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if data:
            self._tail += data
            if len(self._tail) > 2 * self.limit_bytes:
                del self._tail[: -self.limit_bytes]

    def text(self):
        """What was kept as UTF-8 with replacement; a cut names how much is missing."""
        if self.num_bytes <= self.limit_bytes:
            return self._head.decode("utf-8", "replace")
        mark = f"\n[... {self.num_bytes - self.limit_bytes} bytes left out ...]\n".encode()
        room = max(0, self.limit_bytes - len(mark))
        first = room // 2
        last = room - first
        tail = bytes(self._head + self._tail)[-last:] if last else b""
        head = _whole_characters(bytes(self._head[:first]))
        return (head + mark + _from_character(tail)).decode("utf-8", "replace")


def _whole_characters(data):
    """Without the beginning of a character that the cut split."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return data[:-back] if size > back else data
    return data


def _from_character(data):
    """Without the end of a character that the cut split."""
    for start in range(min(3, len(data))):
        if not 0x80 <= data[start] < 0xC0:
            return data[start:]
    return data[3:] if len(data) > 3 else data
