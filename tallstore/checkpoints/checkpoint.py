"""What the rest of tallstore sees of an input checkpoint, wherever its weights are."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from tallstore.checkpoints.torch_dtypes import TORCH_DTYPES
from tallstore.checkpoints.watched import WatchedFiles
from tallstore.errors import DamagedCheckpointError, UnknownTensorError
from tallstore.format.dtypes import DTYPES, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping
    from pathlib import Path
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self


@dataclass(frozen=True, slots=True)
class HubRef:
    """A model of the Hugging Face Hub at one commit.

    Attributes:
        repo_id: ``"org/name"``.
        revision: the commit's full sha.
    """

    repo_id: str
    revision: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a checkpoint came from.

    Attributes:
        where: what messages call it: a path, ``"org/name@sha"`` or ``"a state dict"``.
        files: the weight files.
        directory: the Hugging Face directory, if it is one.
        hub: the model on the Hub, if it was downloaded.
        companions: the files that belong to its weights, by their names beside them; None where they are those of the
            directory.
    """

    where: str
    files: tuple[Path, ...] = ()
    directory: Path | None = None
    hub: HubRef | None = None
    companions: Mapping[str, Path] | None = None


class Checkpoint(abc.ABC):
    """Named tensors whose bytes are read range by range; also a context manager.

    Reads may come from several threads. Files are never modified.

    Attributes:
        origin: where it came from.
        where: what messages call it: a path, ``"org/name@sha"`` or ``"a state dict"``.
        names: every tensor's name, ties included, sorted; the order of shards does not matter.
        aliases: tied name -> the name that carries the storage, which is the first of them in sorted order. Names are
            tied where they are the same elements of one storage, in the same dtype, shape and strides.
        files: the weight files.
        directory: the Hugging Face directory, if it is one; companion files live there.
        hub: the model on the Hub, if it was downloaded.
    """

    def __init__(
        self, origin: Origin, specs: Mapping[str, TensorSpec], aliases: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        if not specs:
            raise DamagedCheckpointError(origin.where, "holds no tensors; give a checkpoint with weights")
        self.origin = origin
        self.where = origin.where
        self.files = origin.files
        self.directory = origin.directory
        self.hub = origin.hub
        self.names = tuple(sorted(specs))
        self.aliases = MappingProxyType(dict(aliases))
        self._specs = specs
        self._closed = False

    def spec(self, name: str) -> TensorSpec:
        """Data type and shape of tensor *name*; reads nothing.

        Raises:
            UnknownTensorError: no tensor has that name.
        """
        try:
            return self._specs[name]
        except KeyError:
            raise UnknownTensorError(self.where, "tensor", name, self.names) from None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [*start*, *stop*) of the flat row-major tensor *name*.

        Reads the bytes asked for only, with two exceptions: a tensor of a state dict that is not contiguous is made so
        once, and a pickle in torch's format of before 1.6 was read whole when it was opened.

        Returns:
            Tensor of one dimension, in the tensor's own dtype, contiguous, on the CPU. It may be a view of a state
            dict: callers must not write to it. What was read of a file is the caller's own: no later change of the file
            reaches it. It stays valid after `close`.

        Raises:
            UnknownTensorError: no tensor has that name.
            DamagedCheckpointError: the tensor is BOOL, and has bytes other than 0 and 1; or a file was changed.
            InputError: a file cannot be read.
            IndexError: the range is not inside the tensor.
        """
        return self._elements(name, self.read_bytes(name, start, stop))

    def map(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """As `read`, but large ranges of files are mapped where that can be: the cheapest way to use them once.

        What is mapped takes no memory of the process, and follows the file: whoever maps it compares it with hashes,
        and must not look at it once the file was shortened, which would end the process. See `watch`.
        """
        return self._elements(name, self._checked(name, start, stop, self._mapped_bytes))

    def _elements(self, name: str, raw: NDArray[np.uint8]) -> torch.Tensor:
        dtype = self._specs[name].dtype
        if not raw.size:  # numpy's empty arrays have strides that torch takes for no view
            return torch.empty(0, dtype=TORCH_DTYPES[dtype])
        # A safetensors file may have its tensors at any byte, and torch computes with whole, aligned elements.
        if raw.ctypes.data % DTYPES[dtype]:
            raw = raw.copy()
        return torch.from_numpy(raw).view(TORCH_DTYPES[dtype])

    def read_bytes(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """The little-endian bytes of the elements that `read` returns; same cost and errors, not to be written to.

        Returns:
            Array of shape ((stop - start) * itemsize,).
        """
        return self._checked(name, start, stop, self._flat_bytes)

    def _checked(
        self, name: str, start: int, stop: int | None, read: Callable[[str, int, int], NDArray[np.uint8]]
    ) -> NDArray[np.uint8]:
        spec = self.spec(name)
        if self._closed:
            raise ValueError(f"{self.where} is closed")
        stop = spec.numel if stop is None else stop
        if not 0 <= start <= stop <= spec.numel:
            raise IndexError(f"elements {start} to {stop} of tensor {name!r}, which has {spec.numel}")
        raw = read(name, start, stop)
        if spec.dtype == "BOOL" and raw.size and raw.max() > 1:
            raise DamagedCheckpointError(
                self.where, f"tensor {name!r} is BOOL and has bytes other than 0 and 1; write the checkpoint again"
            )
        return raw

    def check_unchanged(self) -> None:  # noqa: B027 - what is in memory has no files
        """Make sure that the files are those that were opened.

        Raises:
            DamagedCheckpointError: one was changed, or replaced.
            InputError: one cannot be looked at.
        """

    def version(self, name: str) -> Hashable:  # noqa: ARG002 - of what is in memory there is only one
        """What is another one after somebody wrote to the file of a tensor.

        Raises:
            InputError: the file cannot be found.
        """
        return None

    def watch(self) -> WatchedFiles:
        """The files that `map` maps tensors of."""
        return WatchedFiles(self.files)

    def part(self, names: Iterable[str]) -> Checkpoint:  # noqa: ARG002 - one that cannot be divided is its own part
        """A checkpoint to send to other processes, of which only the tensors *names* will be read.

        Files are read where it comes to; tensors in memory go with it.
        """
        return self

    def __getstate__(self) -> dict[str, object]:
        """For `pickle`, which does not know read-only mappings."""
        return {**self.__dict__, "aliases": dict(self.aliases)}

    def __setstate__(self, state: dict[str, object]) -> None:
        """The inverse."""
        self.__dict__.update(state)

    @abc.abstractmethod
    def _flat_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes of elements [*start*, *stop*) of a tensor that exists, the range being inside it."""

    def _mapped_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """As `_flat_bytes`, for `map`."""
        return self._flat_bytes(name, start, stop)

    def close(self) -> None:
        """Let go of files and tensors; what was read stays valid."""
        self._closed = True
        self._release()

    @abc.abstractmethod
    def _release(self) -> None:
        """Drop every reference to files and tensors."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
