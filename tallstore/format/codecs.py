"""How the decoded bytes of a chunk are stored: raw, as one zstd frame, or as byte planes under zstd.

`encode` and `decode` are inverse, take one chunk, and keep nothing. Decoding never trusts a length that the stored
bytes declare: the caller says how many bytes must come out, before anything is allocated.
"""

from __future__ import annotations

import threading
from typing import Literal

import numpy as np
import zstandard

from tallstore.errors import FormatError
from tallstore.format.bits import Bytes

Codec = Literal["raw", "zstd", "planes-zstd"]

ZSTD_LEVEL = 1  # on packed masks, higher levels are slower and come out larger
MAX_WINDOW = 8 << 20
_FRAME_MAGIC = b"\x28\xb5\x2f\xfd"
_of_thread = threading.local()


def encode(codec: Codec, chunk: Bytes, itemsize: int) -> bytes:
    """The stored bytes of one chunk.

    Args:
        codec: how to store it.
        chunk: the decoded bytes, 1-D.
        itemsize: bytes an element, for the planes.
    """
    if codec == "raw":
        return chunk.tobytes()
    if codec == "planes-zstd":
        chunk = np.ascontiguousarray(chunk.reshape(-1, itemsize).T).reshape(-1)
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=False, write_content_size=True)
    return compressor.compress(chunk.data)


def decode(codec: Codec, stored: Bytes, nbytes: int, itemsize: int, where: str) -> Bytes:
    """The *nbytes* decoded bytes of one chunk.

    Cost: one allocation of *nbytes* (two for planes), none for `raw`, whose result shares the memory of *stored*.

    Raises:
        FormatError: COD-1 to COD-5: *stored* is not the encoding of exactly *nbytes* bytes.
    """
    if codec == "raw":
        if stored.size != nbytes:
            raise FormatError("COD-5", where, f"a raw chunk holds {stored.size} bytes where {nbytes} are due")
        return stored
    decoded = _decode_frame(stored, nbytes, where)
    if codec == "planes-zstd":
        return np.ascontiguousarray(decoded.reshape(itemsize, -1).T).reshape(-1)
    return decoded


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's own: making one costs a fifth of what decoding a chunk costs."""
    if not hasattr(_of_thread, "decompressor"):
        _of_thread.decompressor = zstandard.ZstdDecompressor()
    kept: zstandard.ZstdDecompressor = _of_thread.decompressor
    return kept


def _decode_frame(stored: Bytes, nbytes: int, where: str) -> Bytes:
    raw = stored.data
    if bytes(raw[:4]) != _FRAME_MAGIC:
        skippable = stored.size >= 4 and stored[0] & 0xF0 == 0x50 and bytes(raw[1:4]) == b"\x2a\x4d\x18"
        if skippable:
            raise FormatError("COD-2", where, "a skippable frame stands where the chunk's frame is due")
        raise FormatError("COD-3", where, "the chunk is no zstd frame")
    try:
        frame = zstandard.get_frame_parameters(raw)
    except zstandard.ZstdError as error:
        raise FormatError("COD-3", where, f"the zstd frame's header is damaged ({error})") from None
    if frame.content_size != nbytes:  # also where no size is declared: zstandard gives 2**64 - 1 then
        raise FormatError("COD-1", where, f"the zstd frame does not declare the {nbytes} bytes that are due")
    if frame.dict_id:
        raise FormatError("COD-2", where, "the zstd frame asks for a dictionary")
    # A frame without a window descriptor has a window of its content, which is bounded by the chunk.
    if frame.window_size > max(MAX_WINDOW, nbytes):
        raise FormatError("COD-2", where, f"the zstd frame asks for a window of {frame.window_size} bytes")
    try:  # in one call, into a buffer of the declared size: a frame that holds more cannot make it grow
        decoded = _decompressor().decompress(raw, allow_extra_data=False)
    except zstandard.ZstdError as error:
        if "unused data" in str(error):
            raise FormatError("COD-2", where, "bytes follow the zstd frame") from None
        raise FormatError("COD-3", where, f"the zstd frame is damaged ({error})") from None
    return np.frombuffer(decoded, np.uint8)
