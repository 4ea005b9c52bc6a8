"""zstd frames made by hand, so that they are the same bytes wherever they are made; and byte planes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import xxhash


def frame(
    data: bytes,
    *,
    declared: int | None = -1,
    window_log: int | None = None,
    checksum: bool = False,
    dictionary: int = 0,
    block_nbytes: int = 1 << 17,
) -> bytes:
    """A zstd frame (RFC 8878) of raw and run-length blocks, the same bytes wherever it is made.

    Args:
        data: the content.
        declared: the content size in the header; -1 for the true one, None for none.
        window_log: for a window of 2**window_log bytes; None for a single segment, whose window is its content.
        checksum: whether the content's XXH64 follows.
        dictionary: id of the dictionary that the frame asks for; 0 for none.
        block_nbytes: content of a block, at most.
    """
    if declared is None and window_log is None:
        raise ValueError("a single segment declares its size")
    descriptor = (0x80 if declared is not None else 0) | (0x20 if window_log is None else 0)
    descriptor |= (0x04 if checksum else 0) | (0x01 if dictionary else 0)
    header = b"\x28\xb5\x2f\xfd" + bytes([descriptor])
    if window_log is not None:
        header += bytes([(window_log - 10) << 3])
    if dictionary:
        header += bytes([dictionary])
    if declared is not None:
        header += (len(data) if declared == -1 else declared).to_bytes(4, "little")
    pieces = [
        (is_run, content[start : start + block_nbytes])
        for is_run, content in runs(data)
        for start in range(0, len(content), block_nbytes)
    ]
    body = b""
    for number, (is_run, content) in enumerate(pieces, start=1):
        last = number == len(pieces)
        body += (len(content) << 3 | is_run << 1 | last).to_bytes(3, "little")
        body += content[:1] if is_run else content
    return header + body + (xxhash.xxh64_digest(data)[:3:-1] if checksum else b"")


def runs(data: bytes, shortest: int = 32) -> Iterator[tuple[bool, bytes]]:
    """*data* in parts: (True, one byte repeated) for long runs, (False, anything) between them."""
    content = np.frombuffer(data, np.uint8)
    edges = [0, *(np.flatnonzero(content[1:] != content[:-1]) + 1).tolist(), len(data)]
    pending = 0
    for start, stop in pairwise(edges):
        if stop - start >= shortest:
            if pending < start:
                yield False, data[pending:start]
            yield True, data[start:stop]
            pending = stop
    if pending < len(data):
        yield False, data[pending:]


def planes(data: bytes, nbytes: int) -> bytes:
    """The first bytes of all elements of *nbytes* bytes, then all second bytes, and so on."""
    return np.frombuffer(data, np.uint8).reshape(-1, nbytes).T.tobytes()
