"""What a switcher keeps on a device, packed: with it, a switch there reads no file and sends next to nothing."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tallstore.checkpoints.torch_dtypes import DTYPE_NAMES
from tallstore.errors import OptionError
from tallstore.loading.contents import OfBase
from tallstore.loading.device_decoders import current, decoder_for
from tallstore.loading.device_pieces import Opener, VectorKey, base_pieces
from tallstore.loading.packed import ALIGNMENT, BLOCK_NUMEL, Decode, Form, Packed, Piece, Region
from tallstore.loading.pinned_base import PinnedBase
from tallstore.loading.sending import Sender

_BYTES: Final = Form("same", "U8", "U8", "U8")

#: Where a target lies, and its dtype, by its name.
_Places = Mapping[str, tuple[int, torch.dtype]]


@dataclass(frozen=True)
class _Held:
    """A task on the device.

    Attributes:
        targets: what it was packed for.
        places: where they lie.
        packed: what decoders take.
        keys: of what it has in common with other tasks.
    """

    targets: Mapping[str, Tensor]
    places: _Places
    packed: Sequence[Packed]
    keys: frozenset[Hashable]

    @property
    def nbytes(self) -> int:
        """Of what it has of its own."""
        return sum(packed.nbytes for packed in self.packed)


class DeviceMemory:
    """Packed base, shared vectors and codes on one device, and a decoder for them. One thread may use it.

    The base's tensors stay, and so do shared vectors as long as one of their tasks does; of tasks, the ones used last.

    Attributes:
        device: with its index, where it has one.
    """

    def __init__(self, device: torch.device, decode: Decode, limit_nbytes: int) -> None:
        """Take no memory yet.

        Args:
            device: with its index, where it has one.
            decode: for that device.
            limit_nbytes: of what tasks have of their own, those left out that are asked to stay.
        """
        self.device, self._decode, self._limit = device, decode, limit_nbytes
        self._sender = Sender(device, decode)
        self._shared: dict[Hashable, Tensor] = {}
        self._tasks = OrderedDict[str, _Held]()  # the one used last at the end
        self._is_loose = False  # a task has gone, perhaps with the last use of a shared vector

    @classmethod
    def on(cls, device: torch.device, limit_nbytes: int) -> DeviceMemory | None:
        """The memory of a device with a decoder; None for one without."""
        decode = decoder_for(device)
        return None if decode is None else cls(device, decode, limit_nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(tensor.nbytes for tensor in self._shared.values()) + sum(
            held.nbytes for held in self._tasks.values()
        )

    def holds(self, task: str, targets: Mapping[str, Tensor]) -> bool:
        """Whether the task is here, packed for these targets, and others that hold the same."""
        held = self._tasks.get(task)
        if held is None:
            return False
        return held.targets is targets or _places(targets).items() <= held.places.items()

    def hold(self, opener: Opener, targets: Mapping[str, Tensor], keep: Container[str | None]) -> None:
        """Have tensors of a task here; reads and checks what is not.

        Args:
            opener: of the task.
            targets: by the tensors' names, flat: where they are going to be written to.
            keep: tasks that stay whatever the bound.

        Raises:
            TallstoreError: as the payloads and the base.
            OptionError: the device's memory does not suffice.
        """
        name = opener.task.entry.name
        if not self.holds(name, targets):
            self._tasks.pop(name, None)
            pieces = [
                piece
                for tensor, target in targets.items()
                for piece in opener.pieces(opener.task.tensor(tensor), DTYPE_NAMES[target.dtype], target)
            ]
            self._bring(pieces)
            with self._enough(), current(self.device):
                packed = self._sender.keep(pieces, self._shared)
            keys = frozenset(key for piece in pieces for key in piece.keys.values())
            self._tasks[name] = _Held(targets, _places(targets), packed, keys)
        self._tasks.move_to_end(name)
        self.trim(keep)

    def hold_base(self, base: PinnedBase, targets: Sequence[tuple[Tensor, OfBase]]) -> None:
        """As `hold`, for tensors of the base."""
        self._bring(_of_base(base, targets))

    def write(self, task: str) -> None:
        """Write the tensors of a task, which is here, to their targets."""
        with current(self.device):
            for packed in self._tasks[task].packed:
                self._decode(packed)

    def write_base(self, base: PinnedBase, targets: Sequence[tuple[Tensor, OfBase]]) -> None:
        """Write tensors of the base, which are here, to flat targets."""
        with current(self.device):
            self._sender.write(_of_base(base, targets), self._shared)

    def forget(self) -> None:
        """Forget the tasks; what they share stays for the next one."""
        self._tasks.clear()
        self._is_loose = True

    def _bring(self, pieces: Iterable[Piece]) -> None:
        """Have all that the pieces have in common with other tasks."""
        brought: dict[Hashable, Tensor] = {}
        copies: list[Piece] = []
        with self._enough(), current(self.device):
            for piece in pieces:
                for region, key in piece.keys.items():
                    if key not in self._shared and key not in brought:
                        brought[key] = self._memory(piece, region)
                        nbytes = -(-piece.destination.numel() * piece.form.widths[region] // 8)
                        copies.append(Piece(_BYTES, brought[key][:nbytes], {"base": piece.sources[region]}, {}))
            self._sender.write(copies)
        self._shared |= brought

    def _memory(self, piece: Piece, region: Region) -> Tensor:
        """Whole blocks, where decoders look for them."""
        nbytes = piece.block_count * BLOCK_NUMEL * piece.form.widths[region] // 8
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        if memory.data_ptr() % ALIGNMENT:  # never on CUDA
            memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=self.device)
        return memory[-memory.data_ptr() % ALIGNMENT :][:nbytes]

    def trim(self, keep: Container[str | None]) -> None:
        """Forget tasks that are beyond the bound, and vectors that no task here shares; *keep* as for `hold`."""
        total = sum(held.nbytes for held in self._tasks.values())
        for name in [name for name in self._tasks if name not in keep]:
            if total <= self._limit:
                break
            total -= self._tasks.pop(name).nbytes
            self._is_loose = True
        if not self._is_loose:
            return  # this is done at every switch, and takes longer the more tasks there are
        self._is_loose = False
        used = frozenset[Hashable]().union(*(held.keys for held in self._tasks.values()))
        for key in [key for key in self._shared if isinstance(key, VectorKey) and key not in used]:
            del self._shared[key]

    @contextlib.contextmanager
    def _enough(self) -> Iterator[None]:
        """Say so where the device's memory does not suffice."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise OptionError(
                f"{self.device} lacks the memory for a packed copy of the model's base and experts; "
                "attach the model without on_device"
            ) from None


def _places(targets: Mapping[str, Tensor]) -> _Places:
    return {name: (target.data_ptr(), target.dtype) for name, target in targets.items()}


def _of_base(base: PinnedBase, targets: Iterable[tuple[Tensor, OfBase]]) -> list[Piece]:
    pieces: list[Piece] = []
    for target, content in targets:
        own, wanted = DTYPE_NAMES[content.dtype], DTYPE_NAMES[target.dtype]
        pieces.extend(base_pieces(base, content.tensor, own, wanted, target))
    return pieces
