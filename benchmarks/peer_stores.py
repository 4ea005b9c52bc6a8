"""How others store one expert: each function writes it their way into a folder, reads it back, and returns both."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zstandard
from peer_formats import DELTATENSORS, ZIPNN, Format, missing, release
from safetensors.torch import load, load_file, save_file
from torch import Tensor

SMALL = 4096  # tensors below it stay whole where the formula is ours to run
XET_CHUNK = 8192  # bytes: no chunk of the Hub's deduplication is smaller


@dataclass(frozen=True)
class Expert:
    """One expert and its base: their directories (with model.safetensors), and the base's with a config."""

    base: Path
    finetuned: Path
    config: Path

    @property
    def base_file(self) -> Path:
        """The base's weights."""
        return self.base / "model.safetensors"

    @property
    def finetuned_file(self) -> Path:
        """The expert's weights."""
        return self.finetuned / "model.safetensors"


@dataclass(frozen=True)
class Stored:
    """What one expert costs beside its base, and what comes back."""

    nbytes: int
    weights: Mapping[str, Tensor]


Store = Callable[[Expert, Path], Stored]


@dataclass(frozen=True)
class Peer:
    """One way to store an expert; *package* is what it needs from PyPI, None for a formula or what is here anyway."""

    name: str
    package: str | None
    store: Store

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        return missing(self.name, self.package)

    def release(self) -> str:
        """Package and version, or an empty text."""
        return "" if self.package is None else release(self.package)


def checkpoint(dtype: torch.dtype | None) -> Store:
    """A safetensors file of its own, as it is or cast."""

    def store(expert: Expert, folder: Path) -> Stored:
        path = folder / "model.safetensors"
        weights = load_file(expert.finetuned_file)
        save_file({name: value.to(dtype or value.dtype) for name, value in weights.items()}, path)
        return Stored(path.stat().st_size, load_file(path))

    return store


def zstd_file(level: int) -> Store:
    """The whole checkpoint under zstd."""

    def store(expert: Expert, folder: Path) -> Stored:
        compressed = zstandard.ZstdCompressor(level=level, threads=-1).compress(expert.finetuned_file.read_bytes())
        return _read_back(folder, compressed, zstandard.ZstdDecompressor().decompress)

    return store


def zstd_patch(level: int) -> Store:
    """As `zstd --patch-from=BASE`: the base is the dictionary, the window holds both files."""

    def store(expert: Expert, folder: Path) -> Stored:
        raw, base = expert.finetuned_file.read_bytes(), expert.base_file.read_bytes()
        window = (len(raw) + len(base)).bit_length()
        options = zstandard.ZstdCompressionParameters.from_level(level, window_log=window, enable_ldm=True)
        dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        compressed = zstandard.ZstdCompressor(compression_params=options, dict_data=dictionary).compress(raw)
        reader = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << window)
        return _read_back(folder, compressed, reader.decompress)

    return store


def zstd_xor(level: int) -> Store:
    """XOR with the base, byte planes apart, zstd."""

    def store(expert: Expert, folder: Path) -> Stored:
        weights, base = load_file(expert.finetuned_file), load_file(expert.base_file)
        widths = {name: value.element_size() for name, value in weights.items()}
        planes = {name: (_bytes(weights[name]) ^ _bytes(base[name])).reshape(-1, widths[name]).T for name in weights}
        raw = b"".join(plane.tobytes() for plane in planes.values())
        path = folder / "xor.zst"
        path.write_bytes(zstandard.ZstdCompressor(level=level, threads=-1).compress(raw))
        read = np.frombuffer(zstandard.ZstdDecompressor().decompress(path.read_bytes()), np.uint8)
        back, start = {}, 0
        for name, value in base.items():
            part = read[start : start + value.nbytes].reshape(widths[name], -1).T.reshape(-1) ^ _bytes(value)
            back[name] = torch.from_numpy(part).view(value.dtype).reshape(value.shape)
            start += value.nbytes
        return Stored(path.stat().st_size, back)

    return store


def hub_chunks(expert: Expert, folder: Path) -> Stored:  # noqa: ARG001 - nothing is written
    """At least what the Hub's chunk deduplication keeps: all but runs of a chunk's length that equal the base."""
    raw = np.frombuffer(expert.finetuned_file.read_bytes(), np.uint8)
    base = np.frombuffer(expert.base_file.read_bytes(), np.uint8)
    common = min(raw.size, base.size)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], raw[:common] == base[:common], [False]])))
    runs = edges[1::2] - edges[::2]
    return Stored(raw.size - int(runs[runs >= XET_CHUNK].sum()), load_file(expert.finetuned_file))


def in_format(chosen: Format) -> Store:
    """A file of another library."""

    def store(expert: Expert, folder: Path) -> Stored:
        path = folder / "expert"
        chosen.write(expert.finetuned, expert.base, path)
        return Stored(path.stat().st_size, chosen.read(path, expert.base))

    return store


def fireworks(expert: Expert, folder: Path) -> Stored:
    """XOR with the base and zstd, as its `arc_v2`."""
    from fireworks_delta_compression import (  # noqa: PLC0415 - may be missing
        delta_compress_dicts_to_file,
        delta_decompress_dict_from_file,
    )

    path, base = folder / "delta.safetensors", load_file(expert.base_file)
    delta_compress_dicts_to_file(
        src=base, dst=load_file(expert.finetuned_file), diff_file=str(path), compression_format="arc_v2"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        back = delta_decompress_dict_from_file(src=base, diff_file=str(path), compression_format="arc_v2")
    return Stored(path.stat().st_size, back)


def bitdelta(expert: Expert, folder: Path) -> Stored:
    """BitDelta's formula, sign(task vector) * mean |task vector| a tensor, without the training of its scales."""
    path, parts = folder / "signs.safetensors", {}
    base = load_file(expert.base_file)
    for name, value in load_file(expert.finetuned_file).items():
        if value.numel() < SMALL:
            parts[name] = value
            continue
        task_vector = value.float() - base[name].float()
        parts[f"{name}.scale"] = task_vector.abs().mean()
        parts[f"{name}.signs"] = torch.from_numpy(np.packbits((task_vector > 0).numpy().reshape(-1)))
    save_file(parts, path)
    read, back = load_file(path), {}
    for name, value in base.items():
        if name in read:
            back[name] = read[name]
            continue
        bits = np.unpackbits(read[f"{name}.signs"].numpy(), count=value.numel())
        signs = torch.from_numpy(bits).reshape(value.shape).float() * 2 - 1
        back[name] = (value.float() + signs * read[f"{name}.scale"]).to(value.dtype)
    return Stored(path.stat().st_size, back)


def lora(rank: int) -> Store:
    """A PEFT adapter taken out of the expert by a truncated SVD of each matrix's task vector; the rest is whole."""

    def store(expert: Expert, folder: Path) -> Stored:
        from peft import LoraConfig, PeftModel, get_peft_model  # noqa: PLC0415 - may be missing

        finetuned, base = load_file(expert.finetuned_file), load_file(expert.base_file)
        model = _model(expert, base)
        matrices, whole = [], []
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and weight.numel() >= SMALL:
                matrices.append(name)
            elif weight is not None:
                whole.append(name)
        options = LoraConfig(r=rank, lora_alpha=rank, target_modules=matrices, modules_to_save=whole, bias="lora_only")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            adapted = get_peft_model(model, options, autocast_adapter_dtype=False)
            with torch.no_grad():
                for name in matrices:
                    _set_lora(adapted.base_model.model.get_submodule(name), name, finetuned, base, rank)
                for name in whole:
                    module = adapted.base_model.model.get_submodule(name).modules_to_save["default"]
                    for part, parameter in module.named_parameters():
                        parameter.copy_(finetuned[f"{name}.{part}"])
            adapted.save_pretrained(folder)
            read = PeftModel.from_pretrained(_model(expert, base), folder, autocast_adapter_dtype=False)
            merged = read.merge_and_unload().state_dict()
        return Stored((folder / "adapter_model.safetensors").stat().st_size, {name: merged[name] for name in base})

    return store


def _set_lora(
    layer: torch.nn.Module, name: str, finetuned: Mapping[str, Tensor], base: Mapping[str, Tensor], rank: int
) -> None:
    """The best rank-*rank* approximation of a matrix's task vector into a layer of PEFT, and its bias as it is."""
    task_vector = finetuned[f"{name}.weight"].float() - base[f"{name}.weight"].float()
    embedding = "default" in layer.lora_embedding_A
    left, values, right = torch.linalg.svd(task_vector.T if embedding else task_vector, full_matrices=False)
    root = values[:rank].sqrt()
    down, up = root[:, None] * right[:rank], left[:, :rank] * root
    (layer.lora_embedding_A["default"] if embedding else layer.lora_A["default"].weight).copy_(down)
    (layer.lora_embedding_B["default"] if embedding else layer.lora_B["default"].weight).copy_(up)
    if f"{name}.bias" in finetuned:
        layer.base_layer.bias.copy_(finetuned[f"{name}.bias"])


def _model(expert: Expert, weights: Mapping[str, Tensor]) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModel  # noqa: PLC0415 - heavy, and only PEFT needs it

    model = AutoModel.from_config(AutoConfig.from_pretrained(expert.config), add_pooling_layer=False)
    model = model.to(_dtype(expert))
    model.load_state_dict(dict(weights))
    return model


def _dtype(expert: Expert) -> torch.dtype:
    return next(iter(load_file(expert.base_file).values())).dtype


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _read_back(folder: Path, compressed: bytes, decompress: Callable[[bytes], bytes]) -> Stored:
    path = folder / "compressed"
    path.write_bytes(compressed)
    return Stored(path.stat().st_size, load(bytes(decompress(path.read_bytes()))))


def peers(dtype: str) -> Iterator[Peer]:
    """Everything that is measured for checkpoints of *dtype*."""
    yield Peer(f"checkpoint, {dtype}", "safetensors", checkpoint(None))
    if dtype == "float32":
        yield Peer("checkpoint cast to bfloat16", "safetensors", checkpoint(torch.bfloat16))
        yield Peer("checkpoint cast to float16", "safetensors", checkpoint(torch.float16))
    yield Peer("Hub chunk deduplication against the base, at best", None, hub_chunks)
    yield Peer("zstd -3", "zstandard", zstd_file(3))
    yield Peer("zstd -19", "zstandard", zstd_file(19))
    yield Peer("zstd -3 --patch-from the base", "zstandard", zstd_patch(3))
    yield Peer("ZipNN", "zipnn", in_format(ZIPNN))
    yield Peer("XOR with the base, byte planes, zstd -3", "zstandard", zstd_xor(3))
    yield Peer("Fireworks delta, arc_v2", "fireworks-delta-compression", fireworks)
    yield Peer("deltatensors, int4", "deltatensors", in_format(DELTATENSORS["int4"]))
    yield Peer("deltatensors, 1 bit", "deltatensors", in_format(DELTATENSORS["quantized"]))
    yield Peer("BitDelta's formula, scales not trained", None, bitdelta)
    yield Peer("LoRA by SVD, rank 64", "peft", lora(64))
    yield Peer("LoRA by SVD, rank 16", "peft", lora(16))
