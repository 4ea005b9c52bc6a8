"""`open_bundle`: experts by name, rebuilt when they are asked for, from the bytes that they need and no others."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

import torch
from torch import Tensor, nn

from tallstore.checkpoints import Checkpoint, CheckpointSource, open_checkpoint
from tallstore.errors import BaseMissingError, OptionError
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.manifest import Manifest
from tallstore.format.shard_reader import Verify
from tallstore.loading.expert import Expert
from tallstore.loading.model_weights import LoadResult, load_expert
from tallstore.loading.pinned_base import PinnedBase
from tallstore.sizes import readable

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_SHOWN_TASKS: Final = 4


def open_bundle(
    path: str | os.PathLike[str], *, base: CheckpointSource | None = None, verify: Verify = "first-read"
) -> Bundle:
    """Open a bundle. Reads its manifest, and nothing else.

    Args:
        path: the bundle's directory.
        base: the base that the bundle was packed from, as a path, a state dict or a Hub id, where the bundle neither
            embeds it nor names it, or a copy of it is nearer. Its tensors must be the very ones: they are compared with
            the hashes in the bundle.
        verify: when the hash of a chunk is compared: on its first read in this bundle, never, or on every read.

    Raises:
        BundleNotFoundError: there is no bundle at *path*.
        FormatError: its manifest breaks a rule of the specification.
        OptionError: *verify* is none of the three.
    """
    if verify not in get_args(Verify):
        raise OptionError(f"verify is {verify!r}; give one of {', '.join(map(repr, get_args(Verify)))}")
    return Bundle(BundleFiles(Path(path), verify), base, verify)


class Bundle:
    """Many experts in one directory; made by `open_bundle`. Also a context manager.

    It keeps no weights: every call rebuilds what it returns. Several threads may use it.

    Attributes:
        path: the bundle's directory.
    """

    def __init__(self, files: BundleFiles, base: CheckpointSource | None, verify: Verify) -> None:
        self.path = files.root
        self._files, self._base_source, self._verify = files, base, verify
        self._base: PinnedBase | None = None
        self._lock = threading.Lock()

    @property
    def manifest(self) -> Manifest:
        """What tallstore.json says, frozen."""
        return self._files.manifest

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the bundle's tasks, those that were not fetched included."""
        return tuple(task.name for task in self.manifest.tasks)

    @property
    def bytes_read(self) -> int:
        """Bytes read so far: of the bundle's files, and of the base's tensors."""
        return self._files.nbytes_read + (self._base.nbytes_read if self._base else 0)

    def is_fetched(self, task: str) -> bool:
        """Whether the task's files are here; a partial bundle lists tasks whose files are elsewhere.

        Raises:
            UnknownTaskError: *task* is not in the bundle.
        """
        return self._files.is_fetched(task)

    def keys(self, task: str) -> tuple[str, ...]:
        """The names of an expert's tensors, tied ones included.

        Reads task.json, its group's group.json and base.json, once.

        Raises:
            UnknownTaskError: *task* is not in the bundle.
            NotFetchedError: its files are not here.
            FormatError: a table breaks a rule.
        """
        return self._expert(task).names

    def tensor(
        self, task: str, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
    ) -> Tensor:
        """One tensor of an expert.

        Reads the chunks of this tensor in the task's payloads, the shared vector and the base, and what `keys` reads.

        Args:
            task: the expert's name.
            name: the tensor's.
            device: where it is wanted; it is rebuilt on the CPU and moved.
            dtype: what it is cast to once it is finished, unless it is of integers or bools; None keeps its own.

        Returns:
            A contiguous tensor in memory of its own.

        Raises:
            UnknownTensorError: the expert has no tensor of that name.
            IntegrityError: bytes of the bundle are not the ones that were written.
            BaseMissingError: the bundle neither embeds nor names its base, and none was given.
            BaseMismatchError: the base is not the one that the bundle was packed from.
            OptionError: torch has no such device or dtype.
            UnknownTaskError, NotFetchedError, FormatError: as `keys`.
        """
        place, cast = _device(device), _dtype(dtype)
        return _finished(self._expert(task), name, place, cast)

    def items(
        self, task: str, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of everything that an expert has, one at a time: none is kept when the next is rebuilt.

        A tied tensor comes once for each of its names, in memory of its own. Arguments and errors as for `tensor`.
        """
        place, cast = _device(device), _dtype(dtype)
        expert = self._expert(task)
        return ((name, _finished(expert, name, place, cast)) for name in expert.names)

    def state_dict(
        self, task: str, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
    ) -> dict[str, Tensor]:
        """All tensors of an expert by name; tied names have one tensor. Arguments and errors are those of `tensor`."""
        place, cast = _device(device), _dtype(dtype)
        expert = self._expert(task)
        carriers: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name in expert.names:
            carrier = expert.carrier(name)
            if carrier not in carriers:
                carriers[carrier] = _finished(expert, carrier, place, cast)
            state[name] = carriers[carrier]
        return state

    def load_into(self, model: nn.Module, task: str, strict: bool = True) -> LoadResult:  # noqa: FBT001, FBT002 - torch's
        """Write an expert's tensors into a model's parameters and buffers, in place.

        A parameter keeps its dtype, device and storage; where its dtype is another, the finished tensor is cast.
        Parameters of one storage are written once, and it is enough that the expert has one of their names.

        Args:
            model: its state dict has the expert's names.
            task: the expert's name.
            strict: refuse a model that lacks names, or has others.

        Returns:
            the names that the expert lacks, and those that the model lacks, as `load_state_dict` does.

        Raises:
            OptionError: the model has other names (if *strict*), a tensor of another shape, one that has no memory, or
                ties two that differ in the expert. Nothing was written then.
            TallstoreError: as `tensor`. The tensors before the one that failed were written then.
        """
        return load_expert(self._expert(task), model, strict=strict)

    def close(self) -> None:
        """Let go of open files; a later call opens them again."""
        self._files.close()
        if self._base is not None:
            self._base.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        nbytes = sum(file.size for file in self.manifest.files)
        return f"<Bundle {str(self.path)!r}: {_listed(self.tasks)}, {readable(nbytes)}>"

    def _range(self, task: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flat tensor, [stop - start], reading the chunks that they lie in.

        Raises:
            IndexError: the range is not inside the tensor.
            TallstoreError: as `tensor`.
        """
        expert = self._expert(task)
        numel = expert.spec(name).numel
        if not 0 <= start <= stop <= numel:
            raise IndexError(f"elements {start} to {stop} of tensor {name!r}, which has {numel}")
        return expert.elements(name, start, stop)

    def _expert(self, task: str) -> Expert:
        opened = self._files.task(task)
        with self._lock:
            if self._base is None:
                self._base = PinnedBase(self._files.base, self._open_base, self._verify)
        return Expert(opened, self._files, self._base)

    def _open_base(self) -> Checkpoint:
        if self._base_source is not None:
            return open_checkpoint(self._base_source)
        pin = self.manifest.base
        if pin.embedded:
            return open_checkpoint(self._files.embedded_base())
        if pin.repo_id is not None:
            return open_checkpoint(pin.repo_id if pin.revision is None else f"{pin.repo_id}@{pin.revision}")
        raise BaseMissingError(
            f"{self.path}: the bundle neither embeds its base nor says where it is; "
            "give it: open_bundle(path, base=…) takes a path, a state dict or a Hub id"
        )


def _finished(expert: Expert, name: str, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """A whole tensor, cast where it is a floating-point one, on its device."""
    return expert.tensor(name, dtype).to(device)


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(f"device is {device!r}: {reason}") from None
    return found


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(f"dtype is {dtype!r}; give a floating-point one, such as 'bfloat16' or torch.float32")
    return found


def _listed(tasks: Iterable[str]) -> str:
    names = list(tasks)
    more = ", …" if len(names) > _SHOWN_TASKS else ""
    return f"{len(names)} task{'' if len(names) == 1 else 's'} ({', '.join(names[:_SHOWN_TASKS])}{more})"
