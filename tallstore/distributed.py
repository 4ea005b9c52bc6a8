"""Experts for torch.distributed.checkpoint: each rank reads and rebuilds its own slices, and no rank a whole model.

from torch.distributed import checkpoint
from tallstore.distributed import BundleStorageReader

weights = get_model_state_dict(model)  # of an FSDP2 or tensor-parallel model, or any state dict
with tallstore.open_bundle("bundle", base="base") as bundle:
    checkpoint.load(weights, storage_reader=BundleStorageReader(bundle, "spam"))
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from tallstore.checkpoints.torch_dtypes import TORCH_DTYPES
from tallstore.errors import OptionError
from tallstore.loading.boxes import Box
from tallstore.loading.bundle import Bundle
from tallstore.loading.expert import Expert
from tallstore.loading.model_weights import by_device, is_sent, memory, same_bits


class BundleStorageReader(StorageReader):
    """One expert of a bundle, as `torch.distributed.checkpoint.load` reads a checkpoint. One for each rank.

    Fills plain tensors and DTensors of any placement, in place. The state dict may have fewer tensors than the expert;
    a name that the expert lacks, or another shape, is the planner's error
    (`DefaultLoadPlanner(allow_partial_load=True)` leaves such names as they are). A tensor of another floating-point
    dtype gets the finished expert, cast once. Names that are tied in the expert may both be there, or one of them.

    Cost:
        A rank reads the chunks (2^20 elements of the flat tensor) that its slices have elements in, and decodes each
        once for each slice, on all of torch's threads: for rows (`Shard(0)`, all that FSDP2 does by default) about its
        share; for columns, whose elements are in every chunk, the whole tensor. Memory beyond the state dict: a few
        chunks; for slices on other devices than the CPU also one slice.
    """

    def __init__(self, bundle: Bundle, task: str) -> None:
        """Read the task's tables, no weights.

        Args:
            bundle: opened by this rank, on storage that it sees.
            task: the expert's name.

        Raises:
            UnknownTaskError: *task* is not in the bundle.
            NotFetchedError: its files are not here.
            FormatError: a table breaks a rule.
        """
        super().__init__()
        self._bundle, self._task = bundle, task
        self._expert: Expert = bundle._expert(task)  # noqa: SLF001 - this package's

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin anew.

        Raises:
            OptionError: a *checkpoint_id* was given: bundle and task say what is read.
        """
        if checkpoint_id is not None:
            raise OptionError(
                f"checkpoint_id is {os.fspath(checkpoint_id)!r}, but the storage reader reads task {self._task!r} of "
                f"{self._bundle.path}; leave it out"
            )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003 - torch's signature
        """Whether torch may make a reader of a checkpoint's id alone: no, it takes a bundle and a task."""
        return False

    def read_metadata(self, *_arguments: object, **_keywords: object) -> Metadata:
        """Names, dtypes and shapes of the expert's tensors; reads nothing."""
        names = self._expert.names
        return Metadata(
            {name: _described(self._expert, name) for name in names}, planner_data={name: (name,) for name in names}
        )

    def set_up_storage_reader(
        self,
        metadata: Metadata,
        is_coordinator: bool,  # noqa: FBT001 - torch's
        *_arguments: object,
        **_keywords: object,
    ) -> None:
        """Do nothing: all ranks are alike."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The planner's."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The planner's."""
        return plans

    @torch.no_grad()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Write this rank's slices to where the planner wants them.

        Returns:
            a future that is done.

        Raises:
            IntegrityError: bytes of the bundle are not the ones that were written.
            BaseError: the base is missing, or another one.
            OptionError: one tensor is to hold two that differ in the expert.
            FormatError: a payload breaks a rule.
        """
        requests = [_Request.of(item, planner, self._expert) for item in plan.items]
        self._write(list(self._without_ties(requests)))
        for request in requests:
            if not request.destination.is_inference():
                increment_version(request.destination)  # torch does not see what compiled functions write
            planner.commit_tensor(request.item, request.destination)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _write(self, requests: Sequence[_Request]) -> None:
        self._expert.write_boxes(
            [(request.name, request.box, request.destination) for request in requests if request.is_local]
        )
        sent = {request.name: request.destination for request in requests if request.is_sent}
        for device, targets in by_device(sent).items():
            self._bundle._on(device, self._task).write(targets)  # noqa: SLF001 - this package's
        for request in requests:
            if not request.is_local and not request.is_sent:
                request.destination.copy_(self._staged(request, request.destination.dtype))

    def _staged(self, request: _Request, dtype: torch.dtype) -> Tensor:
        """What a request is for, in new memory on the CPU."""
        staged = torch.empty(request.box.lengths, dtype=dtype, device="cpu")
        self._expert.write_boxes([(request.name, request.box, staged)])
        return staged

    def _without_ties(self, requests: Sequence[_Request]) -> Iterator[_Request]:
        """Each memory once: parameters that are tied in the model are so in the expert, or equal there, bit for bit."""
        places = defaultdict[object, list[_Request]](list)
        for request in requests:
            places[memory(request.name, request.destination)].append(request)
        for first, *others in places.values():
            for other in others:
                if not self._are_equal(first, other):
                    raise OptionError(
                        f"the state dict ties {first.name!r} and {other.name!r}, which differ in task {self._task!r}; "
                        "untie them first, as with config.tie_word_embeddings = False"
                    )
            yield first

    def _are_equal(self, one: _Request, other: _Request) -> bool:
        dtypes = [TORCH_DTYPES[self._expert.spec(request.name).dtype] for request in (one, other)]
        if self._expert.carrier(one.name) == self._expert.carrier(other.name) and one.box == other.box:
            return True
        return dtypes[0] == dtypes[1] and same_bits(self._staged(one, dtypes[0]), self._staged(other, dtypes[1]))


class _Request(NamedTuple):
    """A slice of a tensor, and where it goes: a tensor of the slice's lengths."""

    item: ReadItem
    name: str
    box: Box
    destination: Tensor

    @classmethod
    def of(cls, item: ReadItem, planner: LoadPlanner, expert: Expert) -> _Request:
        name = item.storage_index.fqn
        box = Box(expert.spec(name).shape, tuple(item.storage_offsets), tuple(item.lengths))
        return cls(item, name, box, planner.resolve_tensor(item).detach())

    @property
    def is_local(self) -> bool:
        """Whether chunks can be rebuilt straight into it."""
        return self.destination.device.type == "cpu"

    @property
    def is_sent(self) -> bool:
        """Whether it can be rebuilt on its device."""
        return self.box.is_whole and is_sent(self.destination)


def _described(expert: Expert, name: str) -> TensorStorageMetadata:
    """One chunk, whatever the file's: planners ask for any slice of it."""
    spec = expert.spec(name)
    size = torch.Size(spec.shape)
    whole = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    return TensorStorageMetadata(TensorProperties(TORCH_DTYPES[spec.dtype]), size, [whole])
