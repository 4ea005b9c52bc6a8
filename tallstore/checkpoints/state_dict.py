"""Tensors that are in memory, or that torch has mapped, as a checkpoint."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.parameter import is_lazy

from tallstore.checkpoints.checkpoint import Checkpoint, Origin
from tallstore.checkpoints.refusals import refuse_unmerged_names
from tallstore.checkpoints.torch_dtypes import DTYPE_NAMES, TORCH_DTYPES
from tallstore.checkpoints.watched import WatchedFiles
from tallstore.errors import InputError, QuantizedCheckpointError
from tallstore.format.dtypes import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NESTED_UNDER: Final = ("state_dict", "model")
_MAX_NESTING: Final = 2

_QUANTIZING_LIBRARIES: Final = frozenset({"bitsandbytes", "torchao", "quanto", "optimum"})


def plain_tensors(where: str, state: Mapping[Any, object]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict; if it is nested under "state_dict", "model" or both, what lies beside is ignored.

    Returns:
        Every tensor by name, detached, on its own device and with its own strides.

    Raises:
        QuantizedCheckpointError: a tensor is quantised.
        AdapterCheckpointError: the names are those of an adapter.
        InputError: an entry is no tensor with values, or of a dtype that cannot be stored.
    """
    for _ in range(_MAX_NESTING):
        nested = next((state[key] for key in _NESTED_UNDER if isinstance(state.get(key), Mapping)), None)
        if not isinstance(nested, Mapping):
            break
        state = nested
    tensors: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str):
            key = repr(name) if type(name) is int and abs(name) < 1 << 63 else f"a key of type {type(name).__name__}"
            raise InputError(where, f"has an entry under {key}, which is no name; give a state dict of tensors")
        tensors[name] = _plain(where, name, value)
    refuse_unmerged_names(where, tensors)
    return tensors


def _plain(where: str, name: str, value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise InputError(
            where,
            f"entry {name!r} is of type {type(value).__name__}, not a tensor; remove it, or give the state dict in it",
        )
    if is_lazy(value):
        raise InputError(where, f"tensor {name!r} is not initialised; run the model once, or load its weights first")
    if value.is_quantized or type(value).__module__.partition(".")[0] in _QUANTIZING_LIBRARIES:
        raise QuantizedCheckpointError(where, f"tensor {name!r} is quantised; give the weights from before quantising")
    if value.is_meta:
        raise InputError(where, f"tensor {name!r} is on the meta device, without values; load the weights first")
    if value.layout != torch.strided or value.is_nested:
        raise InputError(where, f"tensor {name!r} is sparse or nested; make it dense first")
    if value.dtype not in DTYPE_NAMES:
        raise InputError(
            where, f"tensor {name!r} is {value.dtype}, which cannot be stored; convert it to one of {_known_dtypes()}"
        )
    tensor = value.detach()
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise InputError(where, f"tensor {name!r} is of type {type(value).__name__}; give ordinary tensors")
    return tensor


def _known_dtypes() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)


class StateDictCheckpoint(Checkpoint):
    """Tensors in memory, or mapped by `torch.load`."""

    def __init__(self, origin: Origin, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what `plain_tensors` returned; copies nothing."""
        specs = {name: TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
        super().__init__(origin, specs, _ties(tensors))
        self._tensors = dict(tensors)
        self._mapped = self.watch()
        self._last_flat: tuple[str, torch.Tensor] | None = None

    def part(self, names: Iterable[str]) -> StateDictCheckpoint:
        """The tensors *names* alone, tied or not."""
        return StateDictCheckpoint(self.origin, {name: self._tensors[name] for name in names})

    def __getstate__(self) -> dict[str, object]:
        """For `pickle`: the bytes of each tensor.

        Tensors themselves would take all of a storage that they share, and between processes shared memory, which is
        scarce.
        """
        raw = {name: self.read_bytes(name).tobytes() for name in self.names}
        return {**super().__getstate__(), "_tensors": raw, "_mapped": WatchedFiles(()), "_last_flat": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The inverse, ties apart."""
        super().__setstate__(state)
        self._tensors = {
            name: torch.frombuffer(bytearray(raw), dtype=TORCH_DTYPES[spec.dtype]).view(spec.shape)
            if raw
            else torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
            for name, raw in state["_tensors"].items()
            for spec in (self._specs[name],)
        }

    def version(self, name: str) -> Hashable:  # noqa: ARG002 - which file a tensor came from is not known
        """As `Checkpoint.version`."""
        return self._mapped.version()

    def _flat_bytes(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        self._mapped.check()
        raw: NDArray[np.uint8] = self._flat(name)[start:stop].cpu().view(torch.uint8).numpy()
        return raw

    def _flat(self, name: str) -> torch.Tensor:
        """The whole tensor in one dimension, on its own device."""
        tensor = self._tensors[name]
        if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
            return tensor.view(-1)
        # Tensors are read one after another, chunk by chunk: keeping the last one makes one copy a tensor, and takes
        # the memory of one.
        last = self._last_flat
        if last is not None and last[0] == name:
            return last[1]
        flat = tensor.resolve_conj().resolve_neg().contiguous().view(-1)
        self._last_flat = (name, flat)
        return flat

    def _release(self) -> None:
        self._tensors = {}
        self._last_flat = None


def _ties(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    carriers: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.numel() == 0:  # no storage to share: all of these are at address 0
            continue
        elements = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        carrier = carriers.setdefault((*elements, tensor.is_conj(), tensor.is_neg()), name)
        if carrier != name:
            aliases[name] = carrier
    return aliases
