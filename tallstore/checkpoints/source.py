"""`open_checkpoint`: from whatever the user gives to a `Checkpoint`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeAlias

import torch

from tallstore.checkpoints.checkpoint import Checkpoint, Origin
from tallstore.checkpoints.directory import Weights, find_weights, place_tensors
from tallstore.checkpoints.file_version import unreadable
from tallstore.checkpoints.hub_input import download
from tallstore.checkpoints.refusals import refuse_adapter_file, refuse_by_config
from tallstore.checkpoints.safetensors_file import SafetensorsCheckpoint, read_shard
from tallstore.checkpoints.state_dict import StateDictCheckpoint, plain_tensors
from tallstore.checkpoints.torch_file import TorchFilesCheckpoint, load_file
from tallstore.errors import CheckpointNotFoundError, InputError
from tallstore.hub.ids import parse_hub_id
from tallstore.hub.pinned import Access

CheckpointSource: TypeAlias = "str | os.PathLike[str] | Mapping[str, torch.Tensor]"
"""What a checkpoint may be given as."""

_SAFETENSORS_SUFFIX: Final = ".safetensors"
_TORCH_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt"})
_WEIGHT_SUFFIXES: Final = _TORCH_SUFFIXES | {_SAFETENSORS_SUFFIX}


def open_checkpoint(source: CheckpointSource, access: Access | None = None) -> Checkpoint:
    """Open a checkpoint for reading; headers and names are checked now, tensors are read when asked for.

    Args:
        source: a .safetensors file; a Hugging Face directory; a .bin, .pt, .pth or .ckpt of plain weights, nested under
            "state_dict" or "model" or not; a state dict; or, where no such path exists, a Hub id
            ``"org/name[@revision]"``.
        access: how the Hub is reached; by default with the token that its login stored.

    Raises:
        CheckpointNotFoundError: there is none.
        DamagedCheckpointError: a file is truncated, malformed, missing or has no tensors.
        UnsafeCheckpointError: a pickle has more than plain weights; it was not executed.
        QuantizedCheckpointError: the weights are quantised.
        AdapterCheckpointError: it is an adapter, not a model.
        InputError: anything else that keeps it from being read.
    """
    if isinstance(source, Mapping):
        origin = Origin("a state dict")
        return StateDictCheckpoint(origin, plain_tensors(origin.where, source))
    text = _path_text(source)
    path = Path(text)
    # "" would be the current directory.
    if text and _exists(path):
        try:
            return _open_path(path)
        except OSError as error:
            raise unreadable(path, error) from None
    hub_id = parse_hub_id(text) if isinstance(source, str) else None
    if hub_id is None or path.suffix.lower() in _WEIGHT_SUFFIXES:
        raise CheckpointNotFoundError(text or "''", "there is no such file or directory")
    return _open_download(hub_id.repo_id, hub_id.revision, access, typed=True)


def open_hub_checkpoint(repo_id: str, revision: str | None, access: Access | None = None) -> Checkpoint:
    """Open a model of the Hub, whatever paths there are here; its weights are downloaded, if the cache has them not.

    Raises:
        InputError: as `open_checkpoint`.
    """
    return _open_download(repo_id, revision, access, typed=False)


def _open_download(repo_id: str, revision: str | None, access: Access | None, *, typed: bool) -> Checkpoint:
    directory, hub = download(repo_id, revision, access or Access(), typed=typed)
    where = f"{hub.repo_id}@{hub.revision}"
    return _open_weights(find_weights(where, directory), Origin(where, directory=directory, hub=hub))


def _path_text(source: object) -> str:
    if isinstance(source, (str, os.PathLike)):
        text: object = os.fspath(source)
        if isinstance(text, str):
            return text
    hint = "give model.state_dict()" if isinstance(source, torch.nn.Module) else "give a path or a state dict"
    raise InputError(f"an object of type {type(source).__name__}", f"is no checkpoint; {hint}")


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null character
        return False
    except OSError as error:
        raise unreadable(path, error) from None
    return True


def _open_path(path: Path) -> Checkpoint:
    where = str(path)
    if path.is_dir():
        refuse_by_config(where, path)
        weights = find_weights(where, path)
        return _open_weights(weights, Origin(where, directory=path))
    if path.name.endswith(".index.json"):
        raise InputError(where, "is an index of shards; give the directory that it is in")
    if path.suffix.lower() not in _WEIGHT_SUFFIXES:
        known = ", ".join(sorted(_WEIGHT_SUFFIXES))
        raise InputError(where, f"is not a checkpoint by its name; give a directory or a file that ends in {known}")
    refuse_adapter_file(path)
    return _open_weights(Weights((path,)), Origin(where))


def _open_weights(weights: Weights, origin: Origin) -> Checkpoint:
    for path in weights.paths:
        if not path.is_file():  # a pipe or a device would be waited for
            raise InputError(str(path), "is not a regular file")
    origin = replace(origin, files=weights.paths)
    if weights.paths[0].suffix.lower() == _SAFETENSORS_SUFFIX:
        shards = {path: read_shard(path) for path in weights.paths}
        places = place_tensors(weights, {path: shard.tensors for path, shard in shards.items()})
        return SafetensorsCheckpoint(origin, shards, places)
    loaded = {path: load_file(path) for path in weights.paths}
    return TorchFilesCheckpoint(origin, loaded, place_tensors(weights, {p: file.tensors for p, file in loaded.items()}))
