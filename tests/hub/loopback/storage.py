"""Contents of files, by the name that the Hub has for them: a git blob id, or a large file's sha256."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.hub.loopback import xet_client
from tests.hub.loopback.xet import XetStore


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def lfs_pointer(sha256: str, nbytes: int) -> bytes:
    """What git keeps of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {nbytes}\n".encode()


class Storage:
    """A directory of contents, and what arrived by Xet beside it.

    Attributes:
        xet: None where the Hub does not speak Xet.
    """

    def __init__(self, root: Path, *, xet: bool) -> None:
        self._contents = root / "contents"
        self._contents.mkdir(parents=True)
        self._xet_home = root / "xet-home"
        self.xet = XetStore(root / "xet") if xet else None
        self.xet_url = ""  # where the Hub's own client finds it

    def put(self, name: str, content: bytes) -> None:
        with self._made(name) as path:
            path.write_bytes(content)

    def add_large(self, sha256: str, content: bytes) -> None:
        """Keep a large file that no client sent, as if one had."""
        self.put(sha256, content)
        if self.xet is not None:
            xet_client.upload(self.xet_url, self._xet_home, self._contents / sha256, sha256)

    def read(self, name: str) -> bytes:
        if not (self._contents / name).is_file() and self.xet is not None and (file := self.xet.file(name)):
            with self._made(name) as path:
                xet_client.download(self.xet_url, self._xet_home, file.name, file.nbytes, path)
        return (self._contents / name).read_bytes()

    def nbytes(self, name: str) -> int:
        return len(self.read(name))

    def xet_hash(self, name: str) -> str | None:
        file = self.xet.file(name) if self.xet else None
        return file.name if file else None

    def put_part(self, name: str, number: int, content: bytes) -> None:
        self.put(f"{name}.{number}", content)

    def join_parts(self, name: str, count: int) -> None:
        """Make a content of its parts.

        Raises:
            ValueError: they are not what they should be.
        """
        parts = [self._contents / f"{name}.{number}" for number in range(1, count + 1)]
        content = b"".join(part.read_bytes() for part in parts)
        if hashlib.sha256(content).hexdigest() != name:
            raise ValueError(name)
        self.put(name, content)
        for part in parts:
            part.unlink()

    @contextlib.contextmanager
    def _made(self, name: str) -> Iterator[Path]:
        """Where to write a content that is there whole or not at all, for others read meanwhile."""
        staged = self._contents / f"{name}-{uuid.uuid4()}"
        yield staged
        staged.replace(self._contents / name)
