"""What has been made of one task while it is packed: its table's entries, and how true they are."""

from __future__ import annotations

from dataclasses import dataclass, field

from tallstore.format import manifest as tables
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.format.encodings import WHOLE
from tallstore.format.manifest import Payload
from tallstore.format.shard_writer import POOLED_NUMEL, PayloadSink
from tallstore.packing.fidelity import Estimated, Sums
from tallstore.packing.plan import Expert


@dataclass(frozen=True)
class StoredWhole:
    """A tensor that was stored whole, for the report.

    Attributes:
        tensor, reason: which, and why.
        nbytes: what it costs.
        degenerate: the fit failed on it; otherwise it was never to be coded.
    """

    tensor: str
    reason: str
    nbytes: int
    degenerate: bool = False


@dataclass(frozen=True)
class CodedTensor:
    """What coding one tensor of one task came to.

    Attributes:
        numel: elements.
        nbytes: of its codes, and of its gains by row and its own values where it has them.
        sums: over the reconstruction, after the final rounding.
    """

    numel: int
    nbytes: int
    sums: Sums


@dataclass(kw_only=True)
class Made:
    """What has been made of one task so far, or of some of its tensors.

    Attributes:
        entries: of the task's table, by tensor.
        whole: what was stored whole.
        coded: by tensor.
        sign, signed: what those fits would reach, tensor by tensor.
    """

    entries: dict[str, tables.Tensor] = field(default_factory=dict)
    whole: list[StoredWhole] = field(default_factory=list)
    coded: dict[str, CodedTensor] = field(default_factory=dict)
    sign: list[Estimated] = field(default_factory=list)
    signed: list[Estimated] = field(default_factory=list)

    def add(self, more: Made) -> None:
        """What was made of further tensors."""
        self.entries |= more.entries
        self.whole += more.whole
        self.coded |= more.coded
        self.sign += more.sign
        self.signed += more.signed

    @property
    def sums(self) -> Sums:
        """Over all coded tensors."""
        return sum((tensor.sums for tensor in self.coded.values()), Sums())


@dataclass(kw_only=True)
class TaskProgress(Made):
    """One task while it is packed.

    Attributes:
        expert: its weights.
        writer: takes its payloads.
    """

    expert: Expert
    writer: PayloadSink

    def store_whole(
        self, name: str, reason: str, start: int = 0, *, role: str = "values", degenerate: bool = False
    ) -> Payload | None:
        """Store elements from *start* on as they are; None where there are none.

        What the fit failed on is stored among the codes: it is what the method costs here.
        """
        checkpoint, shard = self.expert.checkpoint, "mask" if degenerate else "private"
        spec = checkpoint.spec(name)
        encoding, key = WHOLE[spec.dtype], f"{role}/{name}"
        if start == spec.numel:
            self.whole.append(StoredWhole(name, reason, 0, degenerate))
            return None
        if spec.numel - start < POOLED_NUMEL:
            raw = checkpoint.read_bytes(name, start, spec.numel)
            self.whole.append(StoredWhole(name, reason, raw.size, degenerate))
            return self.writer.whole(shard, key, encoding, spec.numel - start, raw)
        payload = self.writer.payload(shard, key, encoding)
        for first in range(start, spec.numel, CHUNK_NUMEL):
            payload.append(checkpoint.read_bytes(name, first, min(first + CHUNK_NUMEL, spec.numel)))
        placed = payload.finish()
        self.whole.append(StoredWhole(name, reason, payload.stored_nbytes, degenerate))
        return placed

    def store_private(self, name: str, reason: str, *, degenerate: bool = False) -> None:
        """Store a whole tensor, and enter it in the table."""
        spec, base_name = self.expert.checkpoint.spec(name), self.expert.base_names[name]
        self.entries[name] = tables.PrivateTensor(
            name=name,
            dtype=spec.dtype,
            shape=spec.shape,
            base=None if base_name == name else base_name,
            values=self.store_whole(name, reason, degenerate=degenerate),
        )
