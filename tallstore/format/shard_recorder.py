"""Takes payloads as a shard writer does, to be put into shards later, by another process it may be."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tallstore.format.bits import Bytes
from tallstore.format.codecs import Codec
from tallstore.format.encodings import Encoding
from tallstore.format.manifest import Payload
from tallstore.format.shard_writer import POOLED_NUMEL, Body, PayloadWriter, Recorded


class ShardRecorder:
    """The payloads of one owner. Several recorders may share a body: their payloads follow one another in it.

    Where a payload is, as `payload` and `whole` tell it, is a placeholder: its `shard` is the payload's position in
    `recorded`.
    """

    def __init__(self, body: Body, *, compress: bool = True) -> None:
        """Record into *body*; *compress* is as for `ShardWriter`."""
        self._body = body
        self._codec: Codec | None = None if compress else "raw"
        self._taken: list[tuple[str, PayloadWriter] | Recorded] = []

    def payload(
        self, stem: str, key: str, encoding: Encoding, codec: Codec | None = None, *, ranked: bool = False
    ) -> PayloadWriter:
        """Begin a payload, as `ShardWriter.payload` does."""
        place = len(self._taken)
        writer = PayloadWriter(self._body, key, encoding, codec or self._codec, place, ranked=ranked)
        self._taken.append((stem, writer))
        return writer

    def whole(
        self, stem: str, key: str, encoding: Encoding, numel: int, decoded: Bytes, *, ranked: bool = False
    ) -> Payload:
        """Take a payload that is at hand, as `ShardWriter.whole` does."""
        if numel >= POOLED_NUMEL:
            return self.payload(stem, key, encoding, ranked=ranked).take_all(decoded, numel)
        self._taken.append(Recorded(stem, key, "raw", 0, 0, (), pooled=np.ascontiguousarray(decoded).tobytes()))
        return Payload(shard=len(self._taken) - 1, codec="pooled", at=0)

    @property
    def recorded(self) -> tuple[Recorded | None, ...]:
        """What was taken, in order; None for what was taken back."""
        return tuple(taken if isinstance(taken, Recorded) else taken[1].recorded(taken[0]) for taken in self._taken)


def new_body(path: Path) -> Body:
    """A body of no shard, in a new file at *path*.

    Raises:
        FileExistsError: there is one.
        FileNotFoundError: its directory is not there.
    """
    path.touch(exist_ok=False)
    return Body("", 0, path)
