"""A model's tensors by the names that files give them: transformers renames some of them, and stacks others.

What `from_pretrained` of transformers 5 makes of files (ViT's modules under new names, the experts of a mixture as one
tensor), `save_pretrained` undoes. The same rules, followed on tensors without memory, say where each tensor of a file
lies in the model: in one of its tensors, all of it or a part that can be written in place.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tallstore.errors import OptionError
from tallstore.loading.model_weights import model_tensors


class NamedTensors:
    """The tensors of *model* by their own names, or by those of files, whichever more of a bundle's *names* are.

    Called, it gives them as they are then: `model.to` may have moved them. The rules are followed once for a model.
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self._model, self._names = model, frozenset(names)
        self._layout: Sequence[object] = ()
        self._parts: Mapping[str, _Part] | None = None

    def __call__(self) -> dict[str, Tensor]:
        """Parameters and buffers, or parts of them that share their memory.

        Raises:
            OptionError: transformers makes a tensor of the model from one of the bundle by more than renaming, stacking
                and cutting.
        """
        own = model_tensors(self._model)
        if self._names <= own.keys() or not _is_of_transformers(self._model):
            return own
        layout = [(name, tensor.shape, _stride(tensor)) for name, tensor in own.items()]
        if layout != self._layout:
            self._parts, self._layout = _parts(self._model, own, self._names), layout
        return own if self._parts is None else {name: part.of(own) for name, part in self._parts.items()}


@dataclass(frozen=True, slots=True)
class _Part:
    """Where a tensor of a file lies in a model.

    Attributes:
        owner: the model's tensor.
        window: shape, stride and offset of the part; None where it is all of it.
    """

    owner: str
    window: tuple[torch.Size, tuple[int, ...], int] | None

    def of(self, own: Mapping[str, Tensor]) -> Tensor:
        tensor = own[self.owner]
        if self.window is None:
            return tensor
        shape, stride, offset = self.window
        return tensor.as_strided(shape, stride, int(tensor.storage_offset()) + offset)


def _parts(model: nn.Module, own: Mapping[str, Tensor], names: frozenset[str]) -> Mapping[str, _Part] | None:
    """Where the tensors of files lie; None where the model's own names are the ones to take."""
    twins = {name: torch.empty_strided(tensor.shape, _stride(tensor), device="meta") for name, tensor in own.items()}
    saved = _as_saved(model, twins)
    if saved is None or len(names & saved.keys()) <= len(names & own.keys()):
        return None
    owners = {_storage(twin): name for name, twin in twins.items()}
    parts = {}
    for name, tensor in saved.items():
        owner = owners.get(_storage(tensor))
        if owner is not None:
            whole = tensor is twins[owner]
            parts[name] = _Part(owner, None if whole else (tensor.shape, tensor.stride(), int(tensor.storage_offset())))
        elif name in names:
            raise OptionError(
                f"tensor {name!r} cannot be written in place: transformers computes what {type(model).__name__} has of"
                " it; take tallstore.transformers.from_bundle"
            )
    written = {part.owner for part in parts.values()}
    return parts | {name: _Part(name, None) for name in own if name not in written}


def _is_of_transformers(model: nn.Module) -> bool:
    library = sys.modules.get("transformers.modeling_utils")  # imported, if the model is one of its
    return library is not None and isinstance(model, library.PreTrainedModel)


def _as_saved(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """What `save_pretrained` makes of *tensors*: views of them where it can; None where its rules cannot be undone."""
    try:
        from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415 - an extra; 4.x lacks it

        with _WithoutCopies():
            saved: Mapping[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    except Exception:  # noqa: BLE001 - whatever its rules raise: names that do not fit are told of as of any model
        return None
    return saved


class _WithoutCopies(TorchFunctionMode):
    """Views stay views."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        return args[0] if function is Tensor.contiguous else function(*args, **(kwargs or {}))


def _stride(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout == torch.strided else ()


def _storage(tensor: Tensor) -> int:
    """The same for views of one tensor, which without memory have no address."""
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return] # noqa: SLF001 - as StorageWeakRef tells it
