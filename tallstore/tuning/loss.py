"""The user's loss: called, checked, and differentiated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from tallstore.errors import OptionError

_NO_DERIVATIVE: Final = "not differentiable with respect to argument"  # as torch says it


@contextlib.contextmanager
def differentiable(seed: int) -> Iterator[None]:
    """Record gradients, whatever the caller's mode, and draw from torch's generators as seeded.

    The caller's generators are as they were afterwards: what the loss draws, such as batches or dropout, is the same in
    every run.
    """
    has_started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if has_started else ()
    with torch.inference_mode(mode=False), torch.enable_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def value_of(loss: Tensor, where: str) -> float:
    """The number in what a loss returned.

    Args:
        loss: it.
        where: what messages call the loss, and the moment.

    Raises:
        OptionError: it is no single finite number in a tensor.
    """
    if not isinstance(loss, Tensor):
        raise OptionError(f"{where} gave an object of type {type(loss).__name__}; return a tensor of one number")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise OptionError(f"{where} gave {loss.dtype} of shape {list(loss.shape)}; return one floating-point number")
    value = loss.detach().item()
    if value - value != 0:
        raise OptionError(f"{where} gave {value}; look at its batch, or lower learning_rate")
    return value


def gradients(loss: Callable[[], Tensor], inputs: Sequence[Tensor], where: str) -> tuple[float, list[Tensor]]:
    """The loss, and its gradient for each of *inputs*: of their shapes and dtypes, 0 where it does not depend on them.

    Args:
        loss: called once.
        inputs: tensors that require gradients.
        where: what messages call the loss, and the moment.

    Raises:
        OptionError: it is no single finite number, or not differentiable by one of *inputs*; or its slope is
            not finite.
    """
    try:
        found = loss()
    except RuntimeError as error:
        if _NO_DERIVATIVE not in str(error):
            raise
        raise OptionError(
            f"{where} uses a tensor that torch does not differentiate by, as the running statistics of a batch norm:"
            " keep it whole with private="
        ) from error
    value = value_of(found, where)
    missing = (
        f"{where} does not depend on the weights that it is given; compute it from them, without detach or no_grad"
    )
    if not found.requires_grad:
        raise OptionError(missing)
    slopes: Sequence[Tensor | None] = torch.autograd.grad(found.sum(), inputs, allow_unused=True)
    if all(slope is None for slope in slopes):
        raise OptionError(missing)
    if not all(slope is None or torch.isfinite(slope).all() for slope in slopes):
        raise OptionError(f"{where} is {value:g}, and its gradient is not finite; look at its batch, or lower the rate")
    return value, [
        torch.zeros_like(at) if at_slope is None else at_slope for at, at_slope in zip(inputs, slopes, strict=True)
    ]
