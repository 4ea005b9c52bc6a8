"""`open_bundle`: experts by name, rebuilt when they are asked for, from the bytes that they need and no others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor, nn

from tallstore import forking
from tallstore.checkpoints import CheckpointSource
from tallstore.errors import BundleChangedError, OptionError
from tallstore.format.bundle_files import BundleFiles
from tallstore.format.manifest import Manifest
from tallstore.format.shard_reader import Verify
from tallstore.hub.opening import open_files
from tallstore.hub.pinned import Access
from tallstore.inspecting.statistics import Statistics, measure_masks
from tallstore.loading import representation
from tallstore.loading.checkpoint_names import NamedTensors
from tallstore.loading.consensus import consensus
from tallstore.loading.device_expert import DeviceExpert
from tallstore.loading.expert import Expert
from tallstore.loading.merging import Merging
from tallstore.loading.model_weights import LoadResult, load_expert
from tallstore.loading.pinned_base import PinnedBase, open_base
from tallstore.loading.stitching import stitch
from tallstore.loading.switching import Switcher
from tallstore.meter import Progress

if TYPE_CHECKING:
    from types import TracebackType

    from huggingface_hub import CommitInfo
    from typing_extensions import Self


def open_bundle(
    path_or_repo_id: str | os.PathLike[str],
    *,
    base: CheckpointSource | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    verify: Verify = "first-read",
) -> Bundle:
    """Open a bundle. Reads its manifest, and nothing else.

    A bundle on the Hub is pinned to one commit now, and its files come into the Hub's cache when they are needed: the
    tables of a task, its masks, the vectors that it shares with others, the base; never those of other tasks. Each is
    checked as it comes in, and what the cache has is not sent again.

    Args:
        path_or_repo_id: the bundle's directory; or, where no such path exists, its id on the Hub,
            ``"org/name[@revision]"``.
        base: the base that the bundle was packed from, as a path, a state dict or a Hub id, where the bundle neither
            embeds it nor names it, or a copy of it is nearer. Its tensors must be the very ones: they are compared with
            the hashes in the bundle.
        revision: a branch, a tag or a commit of the repository; by default ``main``.
        token: for the Hub; by default the one that its login stored.
        cache_dir: where the Hub's cache is, if not in its usual place.
        local_files_only: ask nothing of the Hub. What the cache does not have is an error when it is needed.
        force_download: download what is needed again, whatever the cache has.
        verify: when the hash of a chunk is compared: on its first read in this bundle, and again after its file was
            written to; never; or on every read.

    Raises:
        BundleNotFoundError: there is no bundle at that path, or of that id.
        FormatError: its manifest breaks a rule of the specification.
        HubError: the Hub refuses, or cannot be reached and the cache has nothing.
        OptionError: *verify* is none of the three, or *revision* contradicts the id.
    """
    if verify not in get_args(Verify):
        raise OptionError(f"verify is {verify!r}; give one of {', '.join(map(repr, get_args(Verify)))}")
    access = Access(token, cache_dir, local_files_only, force_download)
    return Bundle(open_files(path_or_repo_id, access, revision, verify), base, verify, access)


class Bundle:
    """Many experts in one directory; made by `open_bundle`. Also a context manager.

    It keeps no weights: every call rebuilds what it returns. Several threads may use it, and so may forked processes.
    Pickled, as for the workers of a `DataLoader` that are spawned, it is opened again where it comes to: the same path,
    or the same commit on the Hub, with the token that is stored there.

    Attributes:
        path: the bundle's directory; of one on the Hub, its snapshot in the cache.
    """

    def __init__(
        self, files: BundleFiles, base: CheckpointSource | None, verify: Verify, access: Access | None = None
    ) -> None:
        self.path = files.root
        self._files, self._base_source, self._verify, self._access = files, base, verify, access
        self._base: PinnedBase | None = None
        self._lock = forking.lock()

    @property
    def manifest(self) -> Manifest:
        """What tallstore.json says, frozen."""
        return self._files.manifest

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the bundle's tasks, those that were not fetched included."""
        return tuple(task.name for task in self.manifest.tasks)

    @property
    def bytes_read(self) -> int:
        """Bytes read so far: of the bundle's files, and of the base's tensors."""
        return self._files.nbytes_read + (self._base.nbytes_read if self._base else 0)

    def is_fetched(self, task: str) -> bool:
        """Whether the task's files are here; a partial bundle lists tasks whose files are elsewhere.

        Of a bundle on the Hub: whether the cache has them.

        Raises:
            UnknownTaskError: *task* is not in the bundle.
        """
        return self._files.is_fetched(task)

    def keys(self, task: str) -> tuple[str, ...]:
        """The names of an expert's tensors, tied ones included.

        Reads task.json, its group's group.json and base.json, once.

        Raises:
            UnknownTaskError: *task* is not in the bundle.
            NotFetchedError: its files are not here.
            FormatError: a table breaks a rule.
        """
        return self._expert(task).names

    def tensor(
        self, task: str, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
    ) -> Tensor:
        """One tensor of an expert.

        Reads the chunks of this tensor in the task's payloads, the shared vector and the base, and what `keys` reads.

        Args:
            task: the expert's name.
            name: the tensor's.
            device: where it is wanted. Packed bytes are sent there, and the tensor is rebuilt on it, by its current
                stream; on the CPU, and moved, where its dtypes or the device's arithmetic are not fit for that.
            dtype: what it is cast to once it is finished, unless it is of integers or bools; None keeps its own.

        Returns:
            A contiguous tensor in memory of its own.

        Raises:
            UnknownTensorError: the expert has no tensor of that name.
            IntegrityError: bytes of the bundle are not the ones that were written.
            BaseMissingError: the bundle neither embeds nor names its base, and none was given.
            BaseMismatchError: the base is not the one that the bundle was packed from.
            OptionError: torch has no such device or dtype, or the device no such dtype.
            UnknownTaskError, NotFetchedError, FormatError: as `keys`.
        """
        place, cast = _device(device), _dtype(dtype)
        return self._on(place, task).tensor(name, cast)

    def items(
        self, task: str, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of everything that an expert has, one at a time: none is kept when the next is rebuilt.

        A tied tensor comes once for each of its names, in memory of its own. Arguments and errors as for `tensor`.
        """
        place, cast = _device(device), _dtype(dtype)
        expert = self._on(place, task)
        self._files.bring([self._files.task(task)])
        return ((name, expert.tensor(name, cast)) for name in self._expert(task).names)

    def state_dict(
        self, task: str, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
    ) -> dict[str, Tensor]:
        """All tensors of an expert by name; tied names have one tensor. Arguments and errors are those of `tensor`."""
        place, cast = _device(device), _dtype(dtype)
        expert = self._expert(task)
        whole = self._on(place, task).tensors(dict.fromkeys(map(expert.carrier, expert.names)), cast)
        return {name: whole[expert.carrier(name)] for name in expert.names}

    def load_into(self, model: nn.Module, task: str, strict: bool = True) -> LoadResult:  # noqa: FBT001, FBT002 - torch's
        """Write an expert's tensors into a model's parameters and buffers, in place.

        A parameter keeps its dtype, device and storage; where its dtype is another, the finished tensor is cast.
        Parameters of one storage are written once, and it is enough that the expert has one of their names.

        Args:
            model: its state dict has the expert's names; or it is a model of transformers whose files have them, where
                transformers renames or stacks what it loads.
            task: the expert's name.
            strict: refuse a model that lacks names, or has others.

        Returns:
            the names that the expert lacks, and those that the model lacks, as `load_state_dict` does.

        Raises:
            OptionError: the model has other names (if *strict*), a tensor of another shape, one that has no memory, one
                that transformers computes from the expert's, or ties two that differ in the expert. Nothing was written
                then.
            TallstoreError: as `tensor`. Some tensors were written then, others not, or not to their end.
        """
        expert = self._expert(task)
        tensors = NamedTensors(model, expert.names)()
        return load_expert(
            expert, tensors, partial(DeviceExpert.on, expert, self._files, self._pinned()), strict=strict
        )

    def attach(
        self,
        model: nn.Module,
        strict: bool = True,  # noqa: FBT001, FBT002 - as load_into
        cache_nbytes: int = 1 << 30,
        *,
        on_device: bool = False,
    ) -> Switcher:
        """Let a model take this bundle's experts in turn, in place.

            switcher = bundle.attach(model)
            switcher.set_expert("movies")
            with switcher.using("spam"):
                ...  # here the model is the expert of spam

        Nothing is written, and no weights are read, before the first switch. The model's parameters and buffers keep
        dtype, device and storage, whatever devices they are on.

        Args:
            model: its state dict has the experts' names; or it is a model of transformers whose files have them, where
                transformers renames or stacks what it loads.
            strict: refuse a switch to an expert that lacks names of the model, or has others. Where it is off, what an
                expert lacks is as in the base; what the base lacks too is left as the model had it.
            cache_nbytes: how many bytes of tasks' masks and whole tensors, decoded, stay in memory beside those of the
                active task; a mask takes 1 to 4 bits a parameter.
            on_device: keep the base, the vectors that tasks share and these masks on the devices that the model is on,
                packed: about as much memory again as the model takes there. A switch then sends next to nothing; the
                first one to each task brings what it needs. *cache_nbytes* then bounds the masks on each device.

        Raises:
            OptionError: the model has no tensor of the base's, or one that transformers computes from the base's; or
                *cache_nbytes* is negative.
            FormatError: base.json breaks a rule.
        """
        return Switcher(
            model,
            self._files,
            self._pinned(),
            strict=strict,
            cache_nbytes=cache_nbytes,
            keep_base=self._verify != "always",
            on_device=on_device,
        )

    @property
    def base_directory(self) -> Path | None:
        """The Hugging Face directory that the base is in, its config and tokenizer with it; None where it is in none.

        Raises:
            InputError: the base cannot be opened.
            BaseMissingError: the bundle neither embeds nor names its base, and none was given.
        """
        return self._pinned().directory

    def consensus(self, k: int = 2, scale: float = 1.0, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """One merged model: of the merged vector, only what at least *k* tasks' masks claim (Consensus Merging).

            base + scale * 1{at least k masks are set} * merged        arXiv 2405.07813, equation 5

        k=2 leaves out what no task or only one claims ("catastrophic" and "selfish" weights). Where tasks store a
        tensor whole, their task vectors are exact, and they are merged and masked by the same rules; a tensor whose
        merged vector came from somebody else's model and is not in the bundle stays at the base. So do tensors of no
        floats, and those that no task has under the base's name. What the base does not have, such as heads, is left
        out.

        Args:
            k: how many masks must be set, from 0 to the number of tasks.
            scale: of the merged vector: the paper tunes it on validation data; 1 / number of tasks makes a mean of a
                sum.
            tasks: whose masks are counted; all by default. They must be of one group; its merged vector is that of all
                of that group's tasks, whoever is named here.

        Returns:
            new tensors by the base's names, in the base's dtypes, on the CPU; ties share one tensor. Where merged is
            float32, they are what the formula gives on the originals in float32; with int8, merged is off by up to half
            a step of its row, and scale times that is what the result is off.

        Cost:
            reads each mask, the merged vector and the base once; a few chunks of memory a task beyond the result.

        Raises:
            OptionError: the tasks are not of one group of TALL-masks, some have tied what others have not, or *k* or
                *scale* is out of range.
            NotFetchedError: a task's files are not here; of a tensor that is stored whole, those of the whole group are
                needed.
            UnknownTaskError, FormatError, IntegrityError, BaseError: as `tensor`.
        """
        return consensus(self._merging(tasks), k, scale)

    def stitch(self, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """One merged model of sparse experts: at every weight, the mean over the tasks that claim it.

            base + sum of mask_t * tau_t / number of masks that are set        Localize-and-Stitch, arXiv 2408.13656

        tau_t are the task vector's own values, as the bundle has them, whatever gain their expert has. Where a task
        stores a tensor whole, it is exact, and claimed where its magnitude is one that was kept of the task; where
        masks were given to `Localize`, wherever it moved.

        Args:
            tasks: to be stitched; all by default. They must be of one group, packed with `Localize`.

        Returns:
            as `consensus`: the formula in float32, on the values as they are stored.

        Cost:
            reads what the tasks have and the base once; a few chunks of memory a task beyond the result.

        Raises:
            OptionError: the tasks are not of one group of sparse experts, or some have tied what others have not.
            UnknownTaskError, NotFetchedError, FormatError, IntegrityError, BaseError: as `tensor`.
        """
        return stitch(self._merging(tasks))

    def statistics(self, tasks: Sequence[str] | None = None, progress: Progress | None = None) -> Statistics:
        """What the masks have in common: densities, the agreement profile, the overlap of each two.

        The masks may be of any method and group that leaves weights out: `mask`, `signed`, `sparse`, and `uniform` of 3
        levels. A tensor is left out, and said to be, where a task stores it whole or in another code.

        Args:
            tasks: whose masks to count; by default all whose files are here.
            progress: is told bytes of masks done, and in all.

        Cost:
            reads each mask once and nothing else, counts on packed bits; memory of a chunk a task. Time grows with the
            number of tasks, that of the overlaps with its square.

        Raises:
            OptionError: *tasks* is no list of names.
            UnknownTaskError, NotFetchedError, FormatError, IntegrityError: as `tensor`.
        """
        return measure_masks(self._files, tasks, progress)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        overwrite: bool = False,
        plots: bool = True,
        progress: Progress | None = None,
    ) -> CommitInfo:
        """Push the bundle to the Hub, as `tallstore.push`, whose arguments, result and errors these are."""
        from tallstore.hub.pushing import push  # noqa: PLC0415 - what only a push needs

        return push(
            self.path,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            overwrite=overwrite,
            plots=plots,
            progress=progress,
        )

    def _merging(self, tasks: Sequence[str] | None) -> Merging:
        if isinstance(tasks, str):
            raise OptionError(f"tasks is {tasks!r}; give a list of names")
        chosen = self.tasks if tasks is None else tuple(dict.fromkeys(tasks))
        return Merging(self._files, self._pinned(), self._files.tables_of(chosen))

    def close(self) -> None:
        """Let go of open files; a later call opens them again."""
        self._files.close()
        if self._base is not None:
            self._base.close()

    def __reduce__(self) -> tuple[object, ...]:
        """For `pickle`: what to open, never a token."""
        source, revision = self._files.opened_as
        access = None if self._access is None else replace(self._access, token=None)
        return _reopened, (
            source,
            revision,
            access,
            _absolute(self._base_source),
            self._verify,
            self.manifest.manifest_sha256,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return representation.in_a_line(self._files)

    def __str__(self) -> str:
        return representation.in_lines(self._files)

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return representation.as_html(self._files)

    def _range(self, task: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flat tensor, [stop - start], reading the chunks that they lie in.

        Raises:
            IndexError: the range is not inside the tensor.
            TallstoreError: as `tensor`.
        """
        expert = self._expert(task)
        numel = expert.spec(name).numel
        if not 0 <= start <= stop <= numel:
            raise IndexError(f"elements {start} to {stop} of tensor {name!r}, which has {numel}")
        return expert.elements(name, start, stop)

    def _expert(self, task: str) -> Expert:
        return Expert(self._files.task(task), self._files, self._pinned())

    def _on(self, device: torch.device, task: str) -> Expert | DeviceExpert:
        expert = self._expert(task)
        return expert if device.type == "cpu" else DeviceExpert.on(expert, self._files, self._pinned(), device)

    def _pinned(self) -> PinnedBase:
        with self._lock:
            if self._base is None:
                self._base = PinnedBase(
                    self._files.base, partial(open_base, self._files, self._base_source, self._access), self._verify
                )
            return self._base


def _reopened(  # noqa: PLR0917 - as pickle calls it
    source: str,
    revision: str | None,
    access: Access | None,
    base: CheckpointSource | None,
    verify: Verify,
    manifest_sha256: str,
) -> Bundle:
    """A bundle that was pickled, opened.

    Raises:
        BundleNotFoundError, FormatError, HubError: as `open_bundle`.
        BundleChangedError: the bundle was changed since.
    """
    bundle = Bundle(open_files(source, access, revision, verify), base, verify, access)
    if bundle.manifest.manifest_sha256 != manifest_sha256:
        raise BundleChangedError(f"{source}: the bundle was changed after it was opened; open it again, and send that")
    return bundle


def _absolute(base: CheckpointSource | None) -> CheckpointSource | None:
    """For a process in another directory; what is no path here is an id on the Hub, or tensors."""
    if isinstance(base, (str, os.PathLike)) and os.path.lexists(base):
        return os.path.abspath(base)  # noqa: PTH100 - as it was given, a link too
    return base


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(f"device is {device!r}: {reason}") from None
    return found


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise OptionError(f"dtype is {dtype!r}; give a floating-point one, such as 'bfloat16' or torch.float32")
    return found
