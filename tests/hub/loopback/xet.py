"""What arrives by Xet: hf_xet's own store in a directory, which its client reads and writes as `local://DIRECTORY`."""

from __future__ import annotations

import hashlib
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

# A shard of metadata: a header, then a file's record, its segments and, by the flags, their checks and the sha256.
_HEADER_NBYTES = 48
_RECORD_NBYTES = 48
_HASH_NBYTES = 32
_END = b"\xff" * _HASH_NBYTES
_WITH_CHECKS = 0x80000000
_WITH_SHA256 = 0x40000000


class XetStore:
    """A store of chunks that the client fills.

    Attributes:
        url: what the client is told to connect to.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self._root = root
        self._files: dict[str, tuple[str, int]] = {}  # sha256 -> Xet's hash, size
        self._seen: set[Path] = set()
        self.url = f"local://{root}"

    def hash_of(self, sha256: str) -> str | None:
        """Xet's name for a file that arrived, None where none did."""
        if sha256 not in self._files:
            self._learn()
        return self._files[sha256][0] if sha256 in self._files else None

    def read(self, sha256: str) -> bytes:
        """The file put together again, for clients that do not speak Xet."""
        import hf_xet  # noqa: PLC0415 - few tests need it

        xet_hash, nbytes = self._files[sha256]
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / sha256
            with hf_xet.XetSession().new_file_download_group(endpoint=self.url) as group:
                group.start_download_file(hf_xet.XetFileInfo(xet_hash, nbytes), str(path))
            return path.read_bytes()

    def add(self, content: bytes) -> None:
        """Put a file there as the client would."""
        import hf_xet  # noqa: PLC0415

        with hf_xet.XetSession().new_upload_commit(endpoint=self.url) as commit:
            commit.start_upload_bytes(content, sha256=hashlib.sha256(content).hexdigest())

    def stored_nbytes(self) -> int:
        """How much there is of chunks, each counted once."""
        return sum(path.stat().st_size for path in self._root.glob("xet/xorbs/xorbs/*") if path.suffix != ".tagset")

    def _learn(self) -> None:
        for path in self._root.glob("xet/xorbs/shards/*.mdb"):
            if path not in self._seen:
                self._files.update(_files_of(path.read_bytes()))
                self._seen.add(path)


def _files_of(shard: bytes) -> Iterator[tuple[str, tuple[str, int]]]:
    at = _HEADER_NBYTES
    while shard[at : at + _HASH_NBYTES] != _END:
        xet_hash = _hexadecimal(shard[at : at + _HASH_NBYTES])
        flags, segments = struct.unpack_from("<II", shard, at + _HASH_NBYTES)
        nbytes = sum(
            struct.unpack_from("<I", shard, at + _RECORD_NBYTES * (1 + segment) + _HASH_NBYTES + 4)[0]
            for segment in range(segments)
        )
        at += _RECORD_NBYTES * (1 + segments * (2 if flags & _WITH_CHECKS else 1))
        if flags & _WITH_SHA256:
            yield _hexadecimal(shard[at : at + _HASH_NBYTES]), (xet_hash, nbytes)
            at += _RECORD_NBYTES


def _hexadecimal(raw: bytes) -> str:
    """A hash as Xet writes it: four words, each the other way round."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))
