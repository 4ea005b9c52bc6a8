"""The base that experts are rebuilt on: opened when it is first needed, checked chunk by chunk as it is read."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path

import xxhash
from torch import Tensor, uint8

from tallstore import forking
from tallstore.checkpoints import Checkpoint, CheckpointSource, open_checkpoint, open_hub_checkpoint
from tallstore.checkpoints.watched import WatchedFiles
from tallstore.errors import BaseMismatchError, BaseMissingError, InputError
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import CHUNK_NUMEL, TensorSpec, chunk_count, chunk_span
from tallstore.format.manifest import BaseTensor
from tallstore.format.payloads import BaseTensors
from tallstore.format.shard_reader import Verify
from tallstore.hub.ids import shown
from tallstore.hub.pinned import Access


def open_base(
    files: BundleFiles, source: CheckpointSource | None, access: Access | None, call: str = "open_bundle(path, base=…)"
) -> Checkpoint:
    """The base of a bundle: the one that was given, or the embedded one, or the one that the bundle names.

    Args:
        files: the bundle's.
        source: what the user gave.
        access: how the Hub is reached.
        call: where the user can give it, for messages.

    Raises:
        InputError: what was given, or is embedded, cannot be opened.
        BaseMissingError: there is none, or the one that the bundle names cannot be had.
    """
    if source is not None:
        return open_checkpoint(source, access)
    pin = files.manifest.base
    if pin.embedded:
        return open_checkpoint(files.embedded_base())
    if pin.repo_id is not None:
        try:
            return open_hub_checkpoint(pin.repo_id, pin.revision, access)
        except InputError as error:
            raise BaseMissingError(
                f"{files.where}: its base cannot be had from {shown(pin.repo_id, pin.revision)}, which the"
                f" bundle names ({error.problem}); give a copy of it: {call}"
            ) from None
    raise BaseMissingError(
        f"{files.where}: the bundle neither embeds its base nor says where it is; "
        f"give it: {call} takes a path, a state dict or a Hub id"
    )


class PinnedBase:
    """The tensors that base.json describes, from wherever the base is; several threads may use it."""

    def __init__(self, tensors: BaseTensors, opener: Callable[[], Checkpoint], verify: Verify) -> None:
        """Read nothing yet.

        Args:
            tensors: those of base.json.
            opener: opens the checkpoint that has them.
            verify: when chunks are compared with their hashes.
        """
        self._tensors, self._opener, self._verify = tensors, opener, verify
        self._checkpoint: Checkpoint | None = None
        self._names: frozenset[str] = frozenset()
        self._ties: dict[str, list[str]] = {}
        for other in tensors.values():
            if other.alias_of is not None:
                self._ties.setdefault(other.alias_of, []).append(other.name)
        self._found: dict[str, str] = {}
        self._verified: dict[str, tuple[Hashable, bytearray]] = {}  # of which version of the file
        self._nbytes_read = 0
        self._lock = forking.lock()

    @property
    def nbytes_read(self) -> int:
        """Bytes of tensors that were read."""
        return self._nbytes_read

    def read(self, name: str, start: int, stop: int, *, mapped: bool = False) -> Tensor:
        """Elements [start, stop) of the flat tensor *name*, which lie in one chunk; not to be written to.

        Reads the whole chunk where it is to be verified, and those elements only where not. *mapped* ones come
        by `Checkpoint.map`.

        Raises:
            BaseMismatchError: BASE-1, the tensor is missing, or of another dtype or shape; BASE-2, its bytes differ.
            InputError: the base cannot be opened.
        """
        tensor = self._tensors[name]
        if tensor.alias_of is not None:
            tensor = self._tensors[tensor.alias_of]
        with self._lock:
            checkpoint = self._open()
            source = self._found.get(tensor.name) or self._find(checkpoint, tensor)
        index = start // CHUNK_NUMEL
        read = checkpoint.map if mapped else checkpoint.read
        if self._verify == "never":
            return self._counted(read(source, start, stop))
        verified = self._verified_of(checkpoint, source, len(tensor.chunks))
        if self._verify == "first-read" and verified[index]:
            known = self._counted(read(source, start, stop))
            if self._verified_of(checkpoint, source, len(tensor.chunks)) is verified:
                return known
        first, last = chunk_span(TensorSpec(tensor.dtype, tensor.shape).numel, index)
        chunk = self._counted(read(source, first, last))
        if xxhash.xxh3_128_hexdigest(chunk.view(uint8).numpy().data) != tensor.chunks[index]:
            more = f" (chunk {index} of {chunk_count(TensorSpec(tensor.dtype, tensor.shape).numel)})" if index else ""
            raise BaseMismatchError("BASE-2", checkpoint.where, tensor.name, f"has other values{more}")
        verified[index] = 1
        return chunk[start - first : stop - first]

    def name_of(self, name: str) -> str:
        """What the checkpoint calls the tensor *name*: that, or a name that is tied to it. Reads none of its bytes.

        Raises:
            BaseMismatchError: BASE-1, as `read`.
            InputError: the base cannot be opened.
        """
        tensor = self._tensors[name]
        if tensor.alias_of is not None:
            tensor = self._tensors[tensor.alias_of]
        with self._lock:
            return self._found.get(tensor.name) or self._find(self._open(), tensor)

    @property
    def directory(self) -> Path | None:
        """The Hugging Face directory that the base is in, where it is in one.

        Raises:
            InputError: the base cannot be opened.
        """
        with self._lock:
            return self._open().directory

    def watch(self) -> WatchedFiles:
        """The files that `read` maps tensors of.

        Raises:
            InputError: the base cannot be opened.
        """
        with self._lock:
            return self._open().watch()

    def close(self) -> None:
        """Let go of the base's files; a later read opens them again, and what another thread is reading stays."""
        with self._lock:
            self._checkpoint = None
            self._found = {}
            self._verified = {}

    def _open(self) -> Checkpoint:
        if self._checkpoint is None:
            checkpoint = self._opener()
            self._names = frozenset(checkpoint.names)
            self._checkpoint = checkpoint  # last: a forked process may find any of these steps to be the last one done
        return self._checkpoint

    def _verified_of(self, checkpoint: Checkpoint, source: str, count: int) -> bytearray:
        """Which of a tensor's *count* chunks were verified since somebody last wrote to its file."""
        version = checkpoint.version(source)
        with self._lock:
            known, verified = self._verified.get(source, (None, None))
            if verified is None or known != version:
                verified = bytearray(count)
                self._verified[source] = version, verified
            return verified

    def _find(self, checkpoint: Checkpoint, tensor: BaseTensor) -> str:
        """The name of *tensor* in the checkpoint: its own, or a tied one: files keep one of several tied names."""
        names: list[str] = [tensor.name, *self._ties.get(tensor.name, ())]
        name = next((name for name in names if name in self._names), None)
        if name is None:
            raise BaseMismatchError("BASE-1", checkpoint.where, tensor.name, "is missing")
        spec = checkpoint.spec(name)
        if (spec.dtype, spec.shape) != (tensor.dtype, tensor.shape):
            problem = f"is {spec.dtype} {list(spec.shape)}, where {tensor.dtype} {list(tensor.shape)} is due"
            raise BaseMismatchError("BASE-1", checkpoint.where, tensor.name, problem)
        self._found[tensor.name] = name
        return name

    def _counted(self, read: Tensor) -> Tensor:
        with self._lock:
            self._nbytes_read += read.nbytes
        return read
