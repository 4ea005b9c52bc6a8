"""An expert on a device: packed bytes are read, checked and sent batch by batch, and decoded where they arrive."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from tallstore.checkpoints.torch_dtypes import DTYPE_NAMES, TORCH_DTYPES
from tallstore.errors import OptionError
from tallstore.format.bundle_files import BundleFiles
from tallstore.loading.device_decoders import current, decoder_for
from tallstore.loading.device_pieces import Opener, is_for_device
from tallstore.loading.expert import Expert
from tallstore.loading.packed import Decode, Piece
from tallstore.loading.pinned_base import PinnedBase
from tallstore.loading.sending import Sender


class DeviceExpert:
    """One task's tensors, rebuilt on a device; where that cannot be, on the CPU, and moved.

    Memory beyond the result, on the CPU and on the device each: four batches of up to 32 MiB, one where copies are not
    asynchronous; without Triton, also a decoded batch and some 50 MiB on the device. One thread may use it.
    """

    def __init__(
        self, expert: Expert, files: BundleFiles, base: PinnedBase, device: torch.device, decode: Decode | None
    ) -> None:
        """Read nothing yet.

        Args:
            expert: the task's, on the CPU.
            files: the bundle's.
            base: of the experts.
            device: where tensors are wanted.
            decode: for that device; None to rebuild on the CPU.
        """
        self._expert, self._files, self._opener = expert, files, Opener(expert.task, files, base)
        self._device = device
        self._sender = None if decode is None else Sender(device, decode)

    @classmethod
    def on(cls, expert: Expert, files: BundleFiles, base: PinnedBase, device: torch.device) -> DeviceExpert:
        """The expert on a device, with the decoder that the device has."""
        found = torch.empty(0, device=device).device  # with its index
        return cls(expert, files, base, found, decoder_for(found))

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A whole tensor in new memory; cast to *dtype*, if it is a floating-point one.

        Raises:
            TallstoreError: as `tensors`.
        """
        return self.tensors([name], dtype)[name]

    def tensors(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """As `tensor`, for several tensors at once. The device may still be at work on them, on its current stream.

        Raises:
            OptionError: the device has no tensors of that dtype.
            TallstoreError: as `Expert.read`.
        """
        whole: dict[str, Tensor] = {}
        names = list(names)
        self._files.bring([self._expert.task], names, ranges=len(names) == 1)

        def destinations() -> Iterator[tuple[str, Tensor]]:
            for name in names:
                spec = self._expert.spec(name)
                own = TORCH_DTYPES[spec.dtype]
                wanted = own if dtype is None or not own.is_floating_point else dtype
                whole[name] = self._empty(spec.shape, wanted, name)
                yield name, whole[name].view(-1)

        self._write(destinations())
        return whole

    def write(self, destinations: Mapping[str, Tensor]) -> None:
        """Write whole tensors to flat, contiguous tensors on the device, by name; cast where the dtype is another.

        Raises:
            TallstoreError: as `Expert.read`. Any part of *destinations* may have been written then.
        """
        self._files.bring([self._expert.task], destinations)
        self._write(destinations.items())
        for destination in destinations.values():
            if not destination.is_inference():
                increment_version(destination)  # torch does not see what kernels of others write

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
        try:
            return torch.empty(shape, dtype=dtype, device=self._device)
        except TypeError as error:  # Apple's GPUs have no float64
            reason = str(error).partition("\n")[0]
            raise OptionError(f"tensor {name!r} is {DTYPE_NAMES[dtype]} on {self._device}: {reason}") from None

    def _write(self, destinations: Iterable[tuple[str, Tensor]]) -> None:
        with current(self._device):
            pieces = self._pieces(destinations)
            if self._sender is None:
                deque(pieces, maxlen=0)  # there are none
            else:
                self._sender.write(pieces)

    def _pieces(self, destinations: Iterable[tuple[str, Tensor]]) -> Iterator[Piece]:
        """What is decoded on the device; the rest is written in passing."""
        for name, destination in destinations:
            tensor, wanted = self._expert.task.tensor(name), DTYPE_NAMES.get(destination.dtype)
            if self._sender is not None and wanted is not None and is_for_device(self._expert.task, tensor, wanted):
                yield from self._opener.pieces(tensor, wanted, destination)
            else:
                destination.copy_(self._expert.tensor(name, destination.dtype).view(-1))
