"""Which files are too large for git, or no text: the Hub keeps those outside, and their etag is their sha256."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

LARGE_NBYTES = 10 << 20

_SUFFIXES = (
    *("7z", "arrow", "bin", "bz2", "ckpt", "ftz", "gz", "h5", "joblib", "lfs.*", "mlmodel", "model", "msgpack", "npy"),
    *("npz", "onnx", "ot", "parquet", "pb", "pickle", "pkl", "pt", "pth", "rar", "safetensors", "tar.*", "tar"),
    *("tflite", "tgz", "wasm", "xz", "zip", "zst"),
)
ATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _SUFFIXES).encode()
"""What a new repository's .gitattributes says."""


def large_patterns(attributes: bytes) -> list[str]:
    """The globs that a .gitattributes keeps outside git."""
    lines = (line.split() for line in attributes.decode().splitlines())
    return [words[0] for words in lines if "filter=lfs" in words[1:]]


def is_large(path: str, nbytes: int, sample: bytes, patterns: Iterable[str]) -> bool:
    """Whether a file is kept outside git; *sample* is how it begins."""
    name = path.rpartition("/")[2]
    by_name = any(fnmatch.fnmatchcase(path if "/" in glob else name, glob) for glob in patterns)
    return by_name or nbytes >= LARGE_NBYTES or b"\0" in sample
