"""Which files of a Hugging Face directory are its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from tallstore.checkpoints.refusals import read_json_object, refuse_adapter_file
from tallstore.errors import DamagedCheckpointError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

STANDARD_FILES: Final = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
"""Pairs of an index of shards and the single file that stands in its place, the most preferred first."""

_MAX_SHOWN: Final = 8
_FOREIGN: Final = frozenset("\\:*?\0")


@dataclass(frozen=True, slots=True)
class Weights:
    """The weight files of a checkpoint.

    Attributes:
        paths: sorted.
        index: tensor name -> file, as the index has it; empty without one.
        index_path: the index.
    """

    paths: tuple[Path, ...]
    index: Mapping[str, Path] = field(default_factory=dict)
    index_path: Path | None = None


def find_weights(where: str, directory: Path) -> Weights:
    """Choose as transformers does: safetensors before pickles, an index before one file; else the only .safetensors.

    Args:
        where: what messages call the directory.
        directory: the directory.

    Raises:
        DamagedCheckpointError: the index is malformed, or names a file that is not there.
        AdapterCheckpointError: the one file is an adapter's.
        InputError: there are no weights, or several candidates.
        OSError: the directory cannot be read.
    """
    for index_name, single in STANDARD_FILES:
        if (directory / index_name).exists():
            return _indexed(directory / index_name)
        if (directory / single).exists():
            return Weights((directory / single,))
    names = sorted(path.name for path in directory.iterdir())
    candidates = [name for name in names if name.endswith(".safetensors")]
    if len(candidates) == 1:
        path = directory / candidates[0]
        refuse_adapter_file(path)
        return Weights((path,))
    if candidates:
        raise InputError(
            where,
            f"has {len(candidates)} .safetensors files and no model.safetensors.index.json "
            f"({_listed(candidates)}); give the index, or one of the files",
        )
    raise InputError(
        where,
        f"has no model.safetensors or pytorch_model.bin, nor their index; it holds {_listed(names)}; "
        "give the directory of a saved model, or a weight file",
    )


def shard_names(index_path: Path) -> dict[str, str]:
    """Read an index: tensor name -> file name.

    Raises:
        DamagedCheckpointError: it is malformed, or names files outside its directory.
    """
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedCheckpointError(str(index_path), "has no weight_map; copy or download it again")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not _is_inside(file_name):
            raise DamagedCheckpointError(
                str(index_path), f"places tensor {name!r} in {file_name!r}, which is no file beside it"
            )
    return weight_map


def _indexed(index_path: Path) -> Weights:
    index = {name: index_path.parent / file_name for name, file_name in shard_names(index_path).items()}
    for name, path in index.items():
        if not path.exists():
            raise DamagedCheckpointError(
                str(index_path),
                f"places tensor {name!r} in {path.name!r}, which is not there; copy or download that shard",
            )
    return Weights(tuple(sorted(set(index.values()))), index, index_path)


def _is_inside(file_name: str) -> bool:
    """Whether it stays in its directory under every system's rules, and is no pattern, which a download would take."""
    path = PurePosixPath(file_name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and not set(file_name) & _FOREIGN


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return (", ".join(names[:_MAX_SHOWN]) or "nothing") + more


def place_tensors(weights: Weights, held: Mapping[Path, Iterable[str]]) -> dict[str, Path]:
    """Tensor name -> its file, given the names that each file holds.

    A tensor that the index leaves out counts, as it does for transformers.

    Raises:
        DamagedCheckpointError: two files hold the same tensor, or the index places one where it is not.
    """
    places: dict[str, Path] = {}
    for path, names in held.items():
        for name in names:
            if name in places:
                raise DamagedCheckpointError(
                    str(path), f"holds tensor {name!r}, which {places[name].name} holds too; remove one of them"
                )
            places[name] = path
    for name, path in weights.index.items():
        if places.get(name) != path:
            raise DamagedCheckpointError(
                str(weights.index_path),
                f"places tensor {name!r} in {path.name!r}, which does not hold it; copy or download both again",
            )
    return places
