"""Files that others store an expert in: how each is written, and how it is read into memory of the process's own."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tallstore.checkpoints.torch_dtypes import TORCH_DTYPES

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

State = dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """One way to store an expert in a file.

    Attributes:
        name: in tables.
        package: what it needs from PyPI.
        module: what is imported to read it.
        file: its name; those that write the same share one.
        write: takes the directories of expert and base, each with a model.safetensors, and the path to write.
        read: takes that path and the base's directory.
        reads_base: whether it is a difference from the base.
    """

    name: str
    package: str
    module: str
    file: str
    write: Callable[[Path, Path, Path], None]
    read: Callable[[Path, Path], State]
    reads_base: bool = False

    def ready(self) -> None:
        """Import what reads it, which takes a second or two for some."""
        importlib.import_module(self.module)


def release(package: str) -> str:
    """Package and version.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    return f"{package} {version(package)}"


def missing(name: str, package: str | None) -> str | None:
    """Why what is called *name* cannot run here, or None."""
    try:
        if package is not None:
            release(package)
    except PackageNotFoundError:
        return f"{name}: skipped, {package} is not installed (pip install {package})"
    return None


def weights(directory: Path) -> Path:
    """The file of a checkpoint."""
    return directory / "model.safetensors"


def views(raw: bytearray) -> State:
    """The tensors of a safetensors file that is in memory, in that memory."""
    length = int.from_bytes(raw[:8], "little")
    state = {}
    for name, entry in json.loads(bytes(raw[8 : 8 + length])).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            part = memoryview(raw)[8 + length + begin : 8 + length + end]
            dtype = TORCH_DTYPES[entry["dtype"]]
            state[name] = torch.frombuffer(part, dtype=dtype).reshape(entry["shape"])
    return state


# --- each format ---


def _write_zipnn(expert: Path, _base: Path, path: Path) -> None:
    from zipnn import ZipNN  # noqa: PLC0415 - may be missing

    is_narrow = next(iter(load_file(weights(expert)).values())).dtype is torch.bfloat16
    raw = bytearray(weights(expert).read_bytes())  # a copy: it writes over its input
    path.write_bytes(ZipNN(input_format="byte", bytearray_dtype="bfloat16" if is_narrow else "float32").compress(raw))


def _read_zipnn(path: Path, _base: Path) -> State:
    from zipnn import ZipNN  # noqa: PLC0415 - may be missing

    return views(ZipNN(input_format="byte").decompress(path.read_bytes()))


def _write_deltatensors(strategy: str) -> Callable[[Path, Path, Path], None]:
    def write(expert: Path, base: Path, path: Path) -> None:
        import deltatensors  # noqa: PLC0415 - may be missing

        with contextlib.redirect_stdout(io.StringIO()):
            deltatensors.save_delta_from_paths(path, expert, base, strategy=strategy, use_gpu=False)

    return write


def _read_deltatensors(path: Path, base: Path) -> State:
    import deltatensors  # noqa: PLC0415 - may be missing

    with contextlib.redirect_stdout(io.StringIO()):
        return {name: torch.from_numpy(value) for name, value in deltatensors.load_delta_from_paths(path, base).items()}


def _write_tensorizer(expert: Path, _base: Path, path: Path) -> None:
    from tensorizer import TensorSerializer  # noqa: PLC0415 - may be missing

    serializer = TensorSerializer(str(path))
    serializer.write_state_dict(load_file(weights(expert)))
    serializer.close()


def _read_tensorizer(*, verify: bool) -> Callable[[Path, Path], State]:
    def read(path: Path, _base: Path) -> State:
        from tensorizer import TensorDeserializer  # noqa: PLC0415 - may be missing

        with TensorDeserializer(str(path), device="cpu", verify_hash=verify) as file:
            return {name: file[name] for name in file.keys()}  # noqa: SIM118 - it iterates over them otherwise

    return read


def _write_flashpack(expert: Path, _base: Path, path: Path) -> None:
    from flashpack import pack_to_file  # noqa: PLC0415 - may be missing

    pack_to_file(load_file(weights(expert)), str(path), target_dtype=None)


def _read_flashpack(*, mapped: bool) -> Callable[[Path, Path], State]:
    def read(path: Path, _base: Path) -> State:
        from flashpack.deserialization import revert_from_file  # noqa: PLC0415 - may be missing

        os.environ["FLASHPACK_CPU_PARALLEL_READ"] = str(int(not mapped))
        state = revert_from_file(str(path))
        return {name: value.clone() for name, value in state.items()} if mapped else state

    return read


def _link(expert: Path, _base: Path, path: Path) -> None:
    path.symlink_to(weights(expert).resolve())


def _read_streamed(path: Path, _base: Path) -> State:
    from runai_model_streamer import SafetensorsStreamer  # noqa: PLC0415 - may be missing

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path))
        return dict(streamer.get_tensors())


ZIPNN = Format("zipnn", "zipnn", "zipnn", "expert.znn", _write_zipnn, _read_zipnn)
DELTATENSORS = {
    strategy: Format(
        f"deltatensors, {called}",
        "deltatensors",
        "deltatensors",
        f"{strategy}.wdelta",
        _write_deltatensors(strategy),
        _read_deltatensors,
        reads_base=True,
    )
    for strategy, called in (("int4", "int4"), ("quantized", "1 bit"))
}
#: All that a full expert is loaded from.
FORMATS = (
    Format(
        "tensorizer", "tensorizer", "tensorizer", "expert.tensors", _write_tensorizer, _read_tensorizer(verify=False)
    ),
    Format(
        "tensorizer, verify_hash",
        "tensorizer",
        "tensorizer",
        "expert.tensors",
        _write_tensorizer,
        _read_tensorizer(verify=True),
    ),
    Format(
        "flashpack, mmap + clone",
        "flashpack",
        "flashpack",
        "expert.flashpack",
        _write_flashpack,
        _read_flashpack(mapped=True),
    ),
    Format(
        "flashpack, parallel read",
        "flashpack",
        "flashpack",
        "expert.flashpack",
        _write_flashpack,
        _read_flashpack(mapped=False),
    ),
    Format(
        "runai-model-streamer",
        "runai-model-streamer",
        "runai_model_streamer",
        "expert.safetensors",
        _link,
        _read_streamed,
    ),
    ZIPNN,
    *DELTATENSORS.values(),
)
