"""Writes checkpoints as Hugging Face lays them out: model.safetensors, or shards of it under one index. Streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from tallstore import files
from tallstore.files import Written
from tallstore.format import layout
from tallstore.format.dtypes import TensorSpec, itemsize

MAX_SHARD_NBYTES = 5 << 30
_STEM = "model"

Read = Callable[[str], Iterable[bytes]]  # a tensor's name -> its little-endian bytes, in pieces


def write_checkpoint(
    directory: Path, specs: Mapping[str, TensorSpec], read: Read, *, max_shard_nbytes: int = MAX_SHARD_NBYTES
) -> dict[str, Written]:
    """Write every tensor of *specs*, in their order, to *directory*.

    Args:
        directory: is there already.
        specs: dtype and shape by name.
        read: streams the bytes of one tensor.
        max_shard_nbytes: a shard holds at least one tensor, and no second one beyond this.

    Returns:
        what was written, by file name.
    """
    shards: list[dict[str, TensorSpec]] = [{}]
    nbytes = 0
    for name, spec in specs.items():
        if shards[-1] and nbytes + spec.nbytes > max_shard_nbytes:
            shards.append({})
            nbytes = 0
        shards[-1][name] = spec
        nbytes += spec.nbytes
    if len(shards) == 1:
        return {f"{_STEM}.safetensors": _write_shard(directory / f"{_STEM}.safetensors", shards[0], read)}
    written = {}
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = layout.shard_name(_STEM, number, len(shards))
        written[name] = _write_shard(directory / name, shard, read)
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs.values())}, "weight_map": weight_map}
    name = f"{_STEM}.safetensors.index.json"
    written[name] = files.write_file(directory / name, json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")
    return written


def _write_shard(path: Path, specs: Mapping[str, TensorSpec], read: Read) -> Written:
    # Wider elements first, so that every tensor starts at a multiple of its element's size.
    ordered = sorted(specs, key=lambda name: itemsize(specs[name].dtype), reverse=True)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        spec = specs[name]
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[bytes]:
        yield len(text).to_bytes(8, "little") + text
        for name in ordered:
            yield from read(name)

    return files.write_stream(path, 8 + len(text) + end, pieces())
