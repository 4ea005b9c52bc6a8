"""Packed elements to weights in plain torch operations, on any device whose arithmetic is IEEE's.

Each operation rounds on its own, so that products and sums are those of the specification; what is selected or copied
is taken as integers, so that it keeps every bit. Decodes a chunk's worth of blocks at a time: the scratch memory is
about 40 bytes for each of their elements, and the number of operations does not grow with that of the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from tallstore.checkpoints.torch_dtypes import TORCH_DTYPES
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.encodings import LOG4_VALUES, UNIFORM_VALUES
from tallstore.format.manifest import SharedDtype
from tallstore.loading.packed import BITS, BLOCK_NUMEL, COLUMNS, SCALED, Form, Packed, Region, Scaled

_SLAB_BLOCKS: Final = CHUNK_NUMEL // BLOCK_NUMEL
_SHARED_DTYPES: Final[Mapping[SharedDtype, torch.dtype]] = {
    "I8": torch.int8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


@torch.no_grad()
def decode(packed: Packed) -> None:
    """Write every piece to its destination; see `Decode`."""
    packed = packed.together()
    wanted = TORCH_DTYPES[packed.form.wanted]
    device = packed.regions["blocks"].device
    elements = torch.empty(packed.block_count, BLOCK_NUMEL, dtype=wanted, device=device)
    for first in range(0, packed.block_count, _SLAB_BLOCKS):
        slab = _Slab(packed, first, min(first + _SLAB_BLOCKS, packed.block_count))
        elements[slab.first : slab.last] = _rebuilt(slab).to(wanted)
    bits = elements.view(BITS[wanted.itemsize][1]).view(-1)
    sources, start = [], 0
    for destination in packed.destinations:
        sources.append(bits[start : start + destination.numel()])
        start += -(-destination.numel() // BLOCK_NUMEL) * BLOCK_NUMEL
    torch._foreach_copy_(list(packed.destinations), sources)


class _Slab:
    """Blocks [first, last) of what is packed; tensors of it are [blocks, elements of a block], or broadcast to that."""

    def __init__(self, packed: Packed, first: int, last: int) -> None:
        self.packed, self.first, self.last = packed, first, last
        self.form: Form = packed.form
        self.device = packed.regions["blocks"].device
        pieces = packed.region("blocks", torch.int32)[first:last]
        self._rows = packed.region("table", torch.int64).view(-1, COLUMNS).index_select(0, pieces)

    def elements(self, name: Region, dtype: torch.dtype) -> Tensor:
        """Elements of a region that has whole ones for each."""
        return self.packed.region(name, dtype).view(-1, BLOCK_NUMEL)[self.first : self.last]

    def codes(self, name: Region, width: int) -> Tensor:
        """Fields of *width* bits, int32."""
        per_byte = 8 // width
        packed = self.packed.regions[name].view(-1, BLOCK_NUMEL // per_byte)[self.first : self.last]
        shifts = torch.arange(0, 8, width, dtype=torch.int32, device=self.device)
        fields = (packed.to(torch.int32).unsqueeze(-1) >> shifts) & ((1 << width) - 1)
        return fields.view(-1, BLOCK_NUMEL)

    def shared(self, name: Region, dtype: SharedDtype) -> Tensor:
        """The values of a shared vector, float32."""
        if dtype == "LOG4":
            return self.looked_up(self.codes(name, 4), LOG4_VALUES)
        return self.elements(name, _SHARED_DTYPES[dtype]).to(torch.float32)

    def looked_up(self, codes: Tensor, values: tuple[float, ...]) -> Tensor:
        """What codes stand for, float32."""
        table = torch.tensor(values, dtype=torch.float32, device=self.device)
        return table.index_select(0, codes.reshape(-1)).view(codes.shape)

    def scales(self, name: Scaled) -> Tensor:
        """The scale of each element, float32."""
        role = SCALED.index(name)
        scales = self.packed.region("scales", torch.float32)
        index, first, length = (self._rows[:, 3 + 3 * role + i].unsqueeze(1) for i in range(3))
        if self.packed.runs[name]:
            further = self._places() - first
            row = torch.where(further < 0, -1, further.div(length.clamp_min(1), rounding_mode="floor")) + 1
            index = (index + row).clamp_(max=scales.numel() - 1)  # behind a piece's end, there is no row
        return scales.index_select(0, index.reshape(-1)).view(index.shape)

    def own_values(self, bits: Tensor, dtype: SharedDtype) -> Tensor:
        """The next value of a sparse tensor where a bit is set, something else where not; float32."""
        values = self.packed.region("values", _SHARED_DTYPES[dtype])
        if not values.numel():
            return torch.zeros(1, dtype=torch.float32, device=self.device)
        ranks = self.packed.region("ranks", torch.int32)[self.first : self.last].unsqueeze(1)
        places = (bits.cumsum(1, dtype=torch.int32) - bits + ranks).clamp_(max=values.numel() - 1)
        return values.index_select(0, places.view(-1)).view(bits.shape).to(torch.float32)

    def _places(self) -> Tensor:
        """Where in its piece each element is, int64."""
        blocks = torch.arange(self.first, self.last, dtype=torch.int64, device=self.device) - self._rows[:, 2]
        inside = torch.arange(BLOCK_NUMEL, dtype=torch.int64, device=self.device)
        return blocks.unsqueeze(1) * BLOCK_NUMEL + inside


def _rebuilt(slab: _Slab) -> Tensor:
    """The expert's elements, in its own dtype."""
    form = slab.form
    result = TORCH_DTYPES[form.result]
    base = slab.elements("base", TORCH_DTYPES[form.base])
    if form.kind == "same":
        return base.to(result)
    delta = _delta(slab)
    total = base.to(torch.float32)
    if form.centre is not None:
        total = total + slab.shared("centre", form.centre) * slab.scales("centre")
    total = total + delta
    bits = BITS[result.itemsize][1]
    return torch.where(delta == 0, base.to(result).view(bits), total.to(result).view(bits)).view(result)


def _delta(slab: _Slab) -> Tensor:
    """Scale times value, 0 where the side is absent; float32."""
    form = slab.form
    codes = slab.codes("codes", form.code_width)
    scales = slab.scales("values")
    if form.kind == "sign":
        return (2 * codes - 1).to(torch.float32) * scales
    if form.kind == "uniform":
        return slab.looked_up(codes, next(v for levels, v in UNIFORM_VALUES.items() if levels == form.levels)) * scales
    if form.values is None:
        raise AssertionError(f"{form.kind} without values")
    if form.kind == "sparse":
        return torch.where(codes == 1, slab.own_values(codes, form.values) * scales, 0.0)
    values = slab.shared("values", form.values) * scales
    if form.kind == "signed":
        return torch.where(codes == 0, 0.0, torch.where(codes == 1, values, -values))
    if form.values_lo is None:
        return torch.where(codes == 1, values, 0.0)
    return torch.where(codes == 1, values, slab.shared("values_lo", form.values_lo) * slab.scales("values_lo"))
