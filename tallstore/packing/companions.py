"""Companion files: what makes weights a model (config, tokenizer, labels), carried verbatim beside them.

Only plain data, by suffix; no weights, no code, no pickles.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tallstore.errors import InputError
from tallstore.format.layout import is_companion_name

SUFFIXES = frozenset({".json", ".txt", ".model", ".tiktoken", ".jinja", ".vocab", ".bpe"})
_NOT_THE_MODEL = frozenset({"trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"})
_MAX_NBYTES = 256 << 20


def companions(directory: Path | None) -> dict[str, Path]:
    """The companion files of a Hugging Face directory, by the name that they will have beside the expert's weights.

    Two levels deep, for sentence-transformers' ``1_Pooling/config.json``. Links are followed, as the Hub's cache needs.
    """
    if directory is None:
        return {}
    found = {}
    for pattern in ("*", "*/*"):
        for path in sorted(directory.glob(pattern)):
            name = path.relative_to(directory).as_posix()
            carried = path.suffix in SUFFIXES and path.name not in _NOT_THE_MODEL
            is_index = name.endswith((".safetensors.index.json", ".bin.index.json"))
            if carried and not is_index and is_companion_name(name) and _is_small_file(path):
                found[name] = path
    return found


def _is_small_file(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= _MAX_NBYTES


@contextlib.contextmanager
def reading(source: Path, where: str) -> Iterator[None]:
    """Where the system refuses to read *source* inside the block, the error is one of the input *where*.

    Raises:
        InputError: in the place of an OSError that names *source*.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or Path(os.fsdecode(error.filename)) != source:
            raise
        raise InputError(where, f"{source} cannot be read: {error.strerror}") from None
