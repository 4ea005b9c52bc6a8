"""An expert's tensors written into a model, in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy

from tallstore.errors import OptionError
from tallstore.loading.device_expert import DeviceExpert
from tallstore.loading.expert import Expert

_SHOWN_NAMES: Final = 5


class LoadResult(NamedTuple):
    """What a load did not find a counterpart for, as `torch.nn.Module.load_state_dict` returns it.

    Attributes:
        missing_keys: names of the model that the expert lacks.
        unexpected_keys: names of the expert that the model lacks.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<LoadResult: all names matched>"
        return f"LoadResult(missing_keys={self.missing_keys!r}, unexpected_keys={self.unexpected_keys!r})"


def load_expert(
    expert: Expert,
    tensors: Mapping[str, Tensor],
    on_device: Callable[[torch.device], DeviceExpert],
    *,
    strict: bool,
) -> LoadResult:
    """Write *expert* into a model; what can be refused is refused before anything is written.

    Args:
        expert: to be written.
        tensors: the model's, by the expert's names.
        on_device: gives the same expert for what of the model is on a device.
        strict: as `match`.

    Raises:
        OptionError: names (if *strict*), shapes or ties do not fit, or a tensor of the model has no memory.
        TallstoreError: as `Expert.read`.
    """
    writes, result = match(expert, tensors, strict=strict)
    with torch.no_grad():
        direct = {name: target for name, target in writes.items() if is_direct(target)}
        expert.write({name: target.detach().view(-1) for name, target in direct.items()})
        for target in direct.values():
            if not target.is_inference():
                increment_version(target)
        for device, targets in by_device(writes).items():
            on_device(device).write(targets)
        for name, target in writes.items():
            if not is_direct(target) and not is_sent(target):
                target.copy_(expert.tensor(name, target.dtype))
    return result


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model's state dict, themselves."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def match(expert: Expert, targets: Mapping[str, Tensor], *, strict: bool) -> tuple[dict[str, Tensor], LoadResult]:
    """What of *expert* is to be written where in a model.

    Args:
        expert: to be written.
        targets: the model's tensors, by the expert's names.
        strict: refuse a model that lacks names, or has others.

    Returns:
        the model's tensors to write, by the expert's names, each memory once; and the names without a counterpart.

    Raises:
        OptionError: names (if *strict*), shapes or ties do not fit, or a tensor of the model has no memory.
        TallstoreError: as `Expert.read`, where the model has one tensor and the expert has two.
    """
    common = {name: targets[name] for name in expert.names if name in targets}
    for name, target in common.items():
        _check_target(name, target, expert)
    storages = by_memory(common)
    result = LoadResult(
        [name for name, target in targets.items() if name not in common and memory(name, target) not in storages],
        [name for name in expert.names if name not in targets],
    )
    if strict and (result.missing_keys or result.unexpected_keys):
        raise OptionError(_mismatch(expert, result))
    for names in storages.values():
        _check_tied(names, expert)
    return {names[0]: common[names[0]] for names in storages.values()}, result


def _check_target(name: str, target: Tensor, expert: Expert) -> None:
    if is_lazy(target) or target.is_meta:
        raise OptionError(
            f"tensor {name!r} of the model has no memory to load into; call model.to_empty(device='cpu') first"
        )
    shape = expert.spec(name).shape
    if tuple(target.shape) != shape:
        raise OptionError(
            f"tensor {name!r} is {list(target.shape)} in the model, {list(shape)} in task {expert.task.entry.name!r}; "
            "make the model with the expert's own configuration"
        )


def by_memory(targets: Mapping[str, Tensor]) -> Mapping[object, list[str]]:
    """Names by the memory that they are written to."""
    names = defaultdict[object, list[str]](list)
    for name, target in targets.items():
        names[memory(name, target)].append(name)
    return names


def memory(name: str, target: Tensor) -> object:
    """Equal for tensors that are one in memory: tied ones."""
    if target.numel() == 0 or is_lazy(target) or target.is_meta:
        return name  # no memory, nothing that could be shared
    return target.device, target.data_ptr(), target.dtype, target.shape, target.stride()


def _check_tied(names: list[str], expert: Expert) -> None:
    """The model has one tensor under several names: the expert's must be one, or equal bit for bit."""
    first, *others = dict.fromkeys(map(expert.carrier, names))
    for other in others:
        if expert.spec(first).dtype != expert.spec(other).dtype or not same_bits(
            expert.tensor(first), expert.tensor(other)
        ):
            raise OptionError(
                f"the model ties {first!r} and {other!r}, which differ in task {expert.task.entry.name!r}; "
                "untie them first, as with config.tie_word_embeddings = False"
            )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two contiguous tensors of one dtype have the same bits."""
    return torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def is_direct(target: Tensor) -> bool:
    """Whether chunks can be rebuilt in its own memory."""
    return target.device.type == "cpu" and target.is_contiguous()


def is_sent(target: Tensor) -> bool:
    """Whether it can be rebuilt in its own memory on a device."""
    is_plain = type(target.detach()) is Tensor and target.layout == torch.strided
    return target.device.type != "cpu" and is_plain and target.is_contiguous()


def by_device(targets: Mapping[str, Tensor]) -> Mapping[torch.device, Mapping[str, Tensor]]:
    """Those of *targets* that are sent, flat, by device."""
    found = defaultdict[torch.device, dict[str, Tensor]](dict)
    for name, target in targets.items():
        if is_sent(target):
            found[target.device][name] = target.detach().view(-1)
    return found


def _mismatch(expert: Expert, result: LoadResult) -> str:
    parts = [
        f"{whose} lacks {len(names)} of the other's tensors: {listed(names)}"
        for whose, names in (
            (f"task {expert.task.entry.name!r}", result.missing_keys),
            ("the model", result.unexpected_keys),
        )
        if names
    ]
    return f"{'; '.join(parts)}; give the model that the expert is of, or strict=False"


def listed(names: Iterable[str]) -> str:
    """The first few of *names*, for a message."""
    names = list(names)
    return ", ".join(map(repr, names[:_SHOWN_NAMES])) + (", …" if len(names) > _SHOWN_NAMES else "")
