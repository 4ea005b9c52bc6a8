"""What writers and readers of shards agree on: safetensors files of U8 payloads, and an index of chunk hashes."""

from __future__ import annotations

ALIGNMENT = 64
RECORD_NBYTES = 32
INDEX_KEY = "index"
POOL_KEY = "pool"
METADATA_KEY = "tallstore"
POOL_ALIGNMENT = 8


def largest_stored(decoded_nbytes: int) -> int:
    """The most bytes that a chunk of *decoded_nbytes* may be stored in: no codec makes incompressible bytes longer."""
    return decoded_nbytes + decoded_nbytes // 128 + 1024


def padded(nbytes: int) -> int:
    """*nbytes* rounded up to the alignment of payloads."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
