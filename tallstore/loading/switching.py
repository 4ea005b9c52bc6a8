"""A model that is one expert after another, in place: always rebuilt from the base, the old expert or the new one."""

from __future__ import annotations

import contextlib
import math
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Final, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tallstore import forking
from tallstore.checkpoints.torch_dtypes import TORCH_DTYPES
from tallstore.errors import OptionError, SwitchError, TallstoreError
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.dtypes import chunk_spans
from tallstore.format.manifest import BasedTensor, BaseTensor, SameTensor
from tallstore.loading.checkpoint_names import NamedTensors
from tallstore.loading.contents import OWN, Content, Holding, OfBase, OfExpert, State, Write
from tallstore.loading.device_writes import DeviceWrites
from tallstore.loading.expert import Expert
from tallstore.loading.model_slots import Slot, check_mode, check_slot, memory_span, slots_of
from tallstore.loading.model_weights import listed, match
from tallstore.loading.model_writer import ModelWriter
from tallstore.loading.pinned_base import PinnedBase
from tallstore.loading.reading_ahead import ReadAhead
from tallstore.loading.resident import ResidentBase, ResidentFiles

_MAX_STATES: Final = 256


class Switcher:
    """One model that takes a bundle's experts in turn, in place; made by `Bundle.attach`.

    A switch writes what the base and the masks give into the model's own parameters and buffers: their memory stays
    where it is, so that optimisers and compiled graphs keep what they hold, tied parameters stay tied, and nothing adds
    up however often experts change. Until the first switch, the model is as it was given.

    Without an expert, the model is the base, where the base has a tensor of that name and shape. What else experts
    write, such as heads, is then what the model had before an expert first wrote there; a copy of that is kept.

    In memory stay: the base, as files that the system has mapped or as the state dict that was given; the vectors that
    the tasks of a group share, at 0.5 to 4 bytes a parameter by their data type, as long as one of its tasks stays; and
    what tasks have of their own (masks at 1 to 4 bits a parameter, whole tensors), the ones used last, up to a bound.
    The active task's stay whatever the bound. With `on_device`, the same is in the memory of the devices that the model
    is on, packed, and a switch sends next to nothing there.

    Threads: switches wait for each other, and for the blocks of `using` and `disable_expert` in other threads. Nothing
    holds back a forward pass that runs outside of such a block while another thread switches.
    """

    def __init__(
        self,
        model: nn.Module,
        files: BundleFiles,
        base: PinnedBase,
        *,
        strict: bool,
        cache_nbytes: int,
        keep_base: bool,
        on_device: bool,
    ) -> None:
        """Read base.json; see `Bundle.attach`.

        Raises:
            OptionError: no tensor of the model is in the base or in a task, as `NamedTensors`, or a bound is negative.
        """
        if cache_nbytes < 0:
            raise OptionError(f"cache_nbytes is {cache_nbytes}; give a number of bytes, 0 or more")
        self._model, self._strict = model, strict
        self._files = ResidentFiles(files, cache_nbytes)
        self._base = ResidentBase(base, keep=keep_base)
        self._tensors = NamedTensors(model, self._files.base.keys())
        self._devices = DeviceWrites(self._files, self._base, cache_nbytes, enabled=on_device)
        self._lock = forking.rlock()
        self._writer = ModelWriter(self._files, self._base, self._devices)
        self._ahead = ReadAhead(self._files)
        self._active_kept = contextlib.ExitStack()
        self._base_names: dict[str, str] = {}  # of tensors that tasks have under another name than the base
        self._places: Sequence[object] = ()  # of the model's tensors; for these, the following was worked out
        self._states: dict[str | None, State] = {}
        self._apart: set[str] = set()  # base tensors that are not in the model's memory
        self._own: dict[str, Tensor] = {}
        self._holdings: dict[str, Holding] = {}
        self._refusals: list[RemovableHandle] = []
        self._failure: str | None = None
        self._state = self._first_state()

    # --- what users see ---

    @property
    def active_expert(self) -> str | None:
        """The task whose expert the model is; None for the base, and before the first switch.

        Raises:
            SwitchError: a switch failed halfway, and the model is none.
        """
        if self._failure is not None:
            raise SwitchError(self._failure)
        return self._state.task

    @property
    def cached_tasks(self) -> tuple[str, ...]:
        """Tasks whose own bytes are in memory, at least in part, the one that was used last at the end."""
        return self._files.resident_tasks

    @property
    def cached_nbytes(self) -> int:
        """Bytes in memory that `cache_nbytes` bounds."""
        return self._files.tasks_nbytes

    @property
    def shared_nbytes(self) -> int:
        """Bytes in memory of the vectors that tasks share."""
        return self._files.groups_nbytes

    @property
    def device_nbytes(self) -> int:
        """Bytes that are kept on devices beside the model; 0 without `on_device`."""
        return self._devices.nbytes

    def set_expert(self, task: str | None) -> None:
        """Make the model the expert of *task*; None makes it the base.

        Everything that can be read and refused is read and refused before anything is written. Should writing fail
        nevertheless, or be interrupted, the old expert is written back and the error raised again.

        Cost: one pass over the tensors that differ; reads nothing of a task that is in memory. Parameters that
        need not change, such as those that both experts have from the base, are left alone where they require no
        gradient (`model.requires_grad_(False)`) and torch counted no write to them.

        Args:
            task: the expert's name.

        Raises:
            SwitchError: writing back failed as well: the model is neither of the two, and its forward pass raises this
                error until a switch succeeds.
            OptionError: the model has other names than the expert (if `strict`), a tensor of another shape, one that
                has no memory, or ties two that differ in the expert. The model is what it was.
            TallstoreError: as `Bundle.tensor`. The model is what it was.
        """
        with self._lock:
            self._switch(task)

    @contextlib.contextmanager
    def using(self, task: str | None) -> Iterator[None]:
        """A block in which the model is the expert of *task*; behind it, it is what it was before.

        Blocks may be nested. Those of other threads, and their switches, wait until this one is done.

        Raises:
            TallstoreError: as `set_expert`, also at the end of the block.
        """
        with self._lock:
            before = self.active_expert
            with self._files.keep(before):
                self._switch(task)
                try:
                    yield
                finally:
                    self._switch(before)

    def disable_expert(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the model is the base; behind it, it is what it was before. As `using`."""
        return self.using(None)

    def prefetch(self, task: str) -> Future[None]:
        """Read and check what the next switch to *task* needs, in a thread of its own.

        It stays in memory until the model is that expert, or another task is prefetched.

        Returns:
            done when it is in memory. Its errors are the ones that `set_expert` would raise, and will.

        Raises:
            UnknownTaskError: *task* is not in the bundle.
        """
        self._files.entry(task)
        return self._ahead.begin(task, partial(self._bring, task, frozenset(self._tensors())))

    def __reduce__(self) -> NoReturn:
        """Refuse `pickle` and `copy`.

        Raises:
            OptionError: always.
        """
        raise OptionError(
            "a Switcher writes to a model of this process, and cannot be copied or sent to another; "
            "send the bundle, and attach a model to it there: bundle.attach(model)"
        )

    def __repr__(self) -> str:
        state = "of no expert: a switch failed" if self._failure is not None else f"active_expert={self._state.task!r}"
        return f"<Switcher {state}>"

    # --- a switch ---

    def _switch(self, task: str | None) -> None:
        slots = slots_of(self._tensors())
        before, wanted = self._state, self._wanted(task, slots)
        with self._files.keep(before.task, task):
            writes = [
                Write(slot, wanted.contents[name]) for name, slot in slots.items() if not self._holds(slot, wanted)
            ]
            self._prepare(slots, wanted, writes)
            try:
                self._write(writes, task)
                self._state = wanted
            except BaseException as error:
                self._undo(before, wanted, [slot for slot, _ in writes], error)
                raise
            self._accept()

    def _accept(self) -> None:
        """The model is what `_state` says."""
        self._failure = None
        while self._refusals:
            self._refusals.pop().remove()
        kept = contextlib.ExitStack()
        kept.enter_context(self._files.keep(self._state.task))
        self._active_kept.close()
        self._active_kept = kept
        if self._ahead.task == self._state.task:
            self._ahead.expect(None)
        self._devices.trim({self._state.task, self._ahead.task})

    def _undo(self, before: State, wanted: State, slots: Sequence[Slot], error: BaseException) -> None:
        """Write back what was there before *error*; where that fails, see to it that nobody runs the model."""
        reason: BaseException = error
        if self._failure is None:
            try:
                writes = [Write(slot, before.contents[slot.name]) for slot in slots if not self._holds(slot, before)]
                self._write(writes, before.task)
            except BaseException as second:  # noqa: BLE001 - whatever it is, the model is broken
                reason = second
            else:
                self._state = before
                return
        self._refuse(
            f"the model is neither {_called(before.task)} nor {_called(wanted.task)}: "
            f"the switch failed halfway ({_described(error)}); call set_expert again, or make the model anew"
        )
        for interruption in (error, reason):
            if not isinstance(interruption, Exception):
                raise interruption
        raise SwitchError(self._failure or "") from error

    def _refuse(self, failure: str) -> None:
        """Let the forward pass of every module raise *failure*."""

        def refuse(_module: nn.Module, _inputs: object) -> NoReturn:
            raise SwitchError(failure)

        if self._failure is None:
            self._refusals = [module.register_forward_pre_hook(refuse) for module in self._model.modules()]
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()  # graphs that were compiled before do not look for new hooks
        self._failure = failure

    # --- what is to be written where ---

    def _first_state(self) -> State:
        """What a model is taken for that was just given: the base, and for the rest what it has."""
        slots = slots_of(self._tensors())
        contents = self._resting(slots)
        fetched = next((task.name for task in self._files.manifest.tasks if self._files.is_fetched(task.name)), None)
        if fetched is not None and OWN in contents.values():
            with contextlib.suppress(TallstoreError):  # a task that cannot be read says so when it is asked for
                self._learn_names(self._expert(fetched))
                contents = self._resting(slots)
        if all(content is OWN for content in contents.values()):
            raise OptionError(
                f"the model has no tensor of the base's: it has {listed(name for name in contents)}, the base "
                f"{listed(self._files.base)}; give the model that the bundle's experts are of"
            )
        return State(None, contents)

    def _wanted(self, task: str | None, slots: Mapping[str, Slot]) -> State:
        """What every slot is to hold; refuses what does not fit. Worked out once for a model whose memory stays."""
        places = [slot.place for slot in slots.values()]
        if places != self._places or len(self._states) > _MAX_STATES:
            self._places, self._states, self._apart = places, {}, set()
            self._devices.forget()
        if task not in self._states:
            state = self._plan(task, slots)
            for name, content in state.contents.items():
                if content is not OWN:
                    check_slot(slots[name])
            self._states[task] = state
        return self._states[task]

    def _plan(self, task: str | None, slots: Mapping[str, Slot]) -> State:
        if task is None:
            return State(None, self._resting(slots))
        expert = self._expert(task)
        owners = {name: slot for slot in slots.values() for name in slot.names}
        matched, _ = match(expert, {name: slot.tensor for name, slot in owners.items()}, strict=self._strict)
        self._learn_names(expert)
        contents = self._resting(slots)
        for name in matched:
            tensor = expert.task.tensor(name)
            if isinstance(tensor, SameTensor):
                content: Content = OfBase(self._base_tensor(tensor.base_name), TORCH_DTYPES[tensor.dtype])
            else:
                content = OfExpert(task, name, expert)
            contents[owners[name].name] = content
        return State(task, contents)

    def _expert(self, task: str) -> Expert:
        return Expert(self._files.task(task), self._files, self._base)

    def _learn_names(self, expert: Expert) -> None:
        for name in expert.names:
            tensor = expert.task.tensor(name)
            if isinstance(tensor, BasedTensor) and name not in expert.task.base and name not in self._base_names:
                self._base_names[name] = tensor.base_name
                self._states = {}
                self._devices.forget()

    def _resting(self, slots: Mapping[str, Slot]) -> dict[str, Content]:
        """What every slot holds without an expert."""
        return {name: self._resting_content(slot) for name, slot in slots.items()}

    def _resting_content(self, slot: Slot) -> Content:
        names = [self._base_names.get(name, name) for name in slot.names]
        found = [self._base_tensor(name) for name in names if name in self._files.base]
        first = next((tensor for tensor in found if tensor.shape == tuple(slot.tensor.shape)), None)
        if first is None:
            return OWN
        for other in found:
            if (other.dtype, other.shape, other.chunks) != (first.dtype, first.shape, first.chunks):
                raise OptionError(
                    f"the model ties {first.name!r} and {other.name!r}, which differ in the base; "
                    "untie them first, as with config.tie_word_embeddings = False"
                )
        return OfBase(first, TORCH_DTYPES[first.dtype])

    def _base_tensor(self, name: str) -> BaseTensor:
        """The base's tensor of that name, or the one that it is tied to."""
        tensor = self._files.base[name]
        return tensor if tensor.alias_of is None else self._files.base[tensor.alias_of]

    def _holds(self, slot: Slot, state: State) -> bool:
        """Whether there is nothing to write."""
        content, holding = state.contents[slot.name], self._holdings.get(slot.name)
        if content is OWN and slot.name not in self._own:
            return True  # nothing else was ever written there
        return slot.is_frozen and holding == Holding(content, slot.place, slot.versions)

    # --- what can fail, before anything is written ---

    def _prepare(self, slots: Mapping[str, Slot], wanted: State, writes: Sequence[Write]) -> None:
        for slot, _ in writes:
            check_mode(slot)
        here, rest = self._devices.split(writes, wanted.task)
        self._hold(wanted.without({write.slot.name for write in here}) if here else wanted)
        self._devices.hold(here, wanted.task, {self._state.task, wanted.task, self._ahead.task})
        self._check_apart(slots, wanted.base_tensors)
        for slot, content in writes:
            if content is not OWN and self._state.contents.get(slot.name, OWN) is OWN and slot.name not in self._own:
                self._own[slot.name] = slot.tensor.detach().clone()
        self._writer.stage(rest)

    def _hold(self, state: State) -> None:
        """Have in memory, checked, what a state is made of."""
        coded = state.of_expert
        if coded:
            self._files.hold(coded[0].expert.task, [content.name for content in coded])
        for tensor in state.base_tensors:
            self._base.hold(tensor.name, math.prod(tensor.shape))
        self._base.check()

    def _bring(self, task: str, names: frozenset[str]) -> None:
        """Have in memory what the model will take of a task: tensors of these names."""
        expert = self._expert(task)
        self._hold(State(task, {name: OfExpert(task, name, expert) for name in expert.names if name in names}))

    def _check_apart(self, slots: Mapping[str, Slot], tensors: Iterable[BaseTensor]) -> None:
        """Refuse a base in the model's own memory, which the first switch would overwrite."""
        unchecked = [tensor for tensor in tensors if tensor.name not in self._apart]
        if not unchecked:
            return
        taken = sorted(
            (*memory_span(slot.tensor), name) for name, slot in slots.items() if slot.tensor.device.type == "cpu"
        )
        starts = [start for start, _, _ in taken]
        for tensor in unchecked if taken else ():
            for first, last in chunk_spans(math.prod(tensor.shape)):
                begin, end = memory_span(self._base.read(tensor.name, first, last))
                place = bisect_left(starts, end) - 1
                if place >= 0 and taken[place][1] > begin:
                    raise OptionError(
                        f"tensor {taken[place][2]!r} of the model is in the memory of the base's {tensor.name!r}, "
                        "which a switch would overwrite; open the bundle with a copy of the base"
                    )
            self._apart.add(tensor.name)

    # --- writing ---

    def _write(self, writes: Sequence[Write], task: str | None) -> None:
        for slot, _ in writes:
            self._holdings.pop(slot.name, None)
        self._writer.write(writes, task, self._own)
        for slot, _ in writes:
            slot.count_write()
        for slot, content in writes:  # once all are counted: those of one tensor's parts are counted together
            self._holdings[slot.name] = Holding(content, slot.place, slot.versions)


def _called(task: str | None) -> str:
    return "the base" if task is None else f"expert {task!r}"


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
