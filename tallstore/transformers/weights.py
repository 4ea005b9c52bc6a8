"""An expert's tensors as transformers' loader takes them: none is rebuilt before it is known where it is wanted."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tallstore import forking
from tallstore.checkpoints.torch_dtypes import TORCH_DTYPES
from tallstore.loading.bundle import Bundle


class Weight:
    """One tensor of an expert, which the loader asks for by ``weight[...].to(device=…, dtype=…)``.

    Tied names have one `Weight`, which gives all of them the same tensor. Several threads may ask.

    Attributes:
        dtype: its own.
    """

    def __init__(self, bundle: Bundle, task: str, name: str, *, is_tied: bool) -> None:
        self._bundle, self._task, self._name, self._is_tied = bundle, task, name, is_tied
        self._lock = forking.lock()
        self._made: dict[tuple[object, object], Tensor] = {}
        self.dtype = TORCH_DTYPES[bundle._expert(task).spec(name).dtype]  # noqa: SLF001 - this package's

    @property
    def shared_places(self) -> set[int]:
        """The addresses of what several names were given."""
        return {tensor.data_ptr() for tensor in self._made.values()}

    def is_floating_point(self) -> bool:
        """As of a tensor; transformers asks where the config has no dtype."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Weight | Tensor:  # noqa: ANN401 - whatever a tensor takes
        return self if index is Ellipsis else self.to()[index]

    def to(self, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Rebuild it, on *device* and in *dtype*.

        Raises:
            TallstoreError: as `Bundle.tensor`.
        """
        if not self._is_tied:
            return self._rebuilt(device, dtype)
        with self._lock:
            if (device, dtype) not in self._made:
                self._made[device, dtype] = self._rebuilt(device, dtype)
            return self._made[device, dtype]

    def _rebuilt(self, device: torch.device | str | int | None, dtype: torch.dtype | None) -> Tensor:
        cast = dtype if dtype is not None and dtype.is_floating_point else None
        place = torch.device("cpu" if device is None else device)
        tensor = self._bundle.tensor(self._task, self._name, place, cast)
        return tensor if dtype is None else tensor.to(dtype)


def weights_of(bundle: Bundle, task: str) -> dict[str, Weight]:
    """Every tensor of an expert by name, in the names' order, as a file has them. Reads tables where files are here.

    Of a bundle on the Hub, all that the expert needs is brought: single tensors would come by ranges, past the cache.

    Raises:
        TallstoreError: as `Bundle.keys`.
    """
    expert = bundle._expert(task)  # noqa: SLF001 - this package's
    bundle._files.bring([expert.task])  # noqa: SLF001
    carriers = {name: expert.carrier(name) for name in sorted(expert.names)}
    tied = {carrier for name, carrier in carriers.items() if name != carrier}
    made = {carrier: Weight(bundle, task, carrier, is_tied=carrier in tied) for carrier in carriers.values()}
    return {name: made[carrier] for name, carrier in carriers.items()}


def separate(model: nn.Module, weights: Mapping[str, Weight]) -> None:
    """Give memory of their own to parameters of *model* that are one tensor in the bundle, and two in the model."""
    shared = set[int]().union(*(weight.shared_places for weight in weights.values()))
    seen: set[int] = set()
    for parameter in itertools.chain(model.parameters(), model.buffers()):
        if parameter.data_ptr() in shared & seen:
            parameter.data = parameter.data.clone()
        seen.add(parameter.data_ptr())
