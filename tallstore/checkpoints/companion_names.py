"""The names of companion files: what lies beside weights and makes them a model.

An allow-list. Configurations, vocabularies, tokenizers, processors, chat templates and labels are plain data and have
one of few suffixes; licences and notices have their names. Weights, code and pickles are on no such list.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Final

SUFFIXES: Final = frozenset(
    {".json", ".txt", ".model", ".spm", ".tiktoken", ".vocab", ".bpe", ".codes", ".tokenizer", ".jinja"}
)
"""Of the files that `save_pretrained` writes, and of older tokenizers' (``bpe.codes``, ``prophetnet.tokenizer``).

Tables (.csv, .tsv, .jsonl) are not among them: beside a model they are training data more often than labels. Nor is
.yaml: nothing in transformers reads it, and what does may build any object from it.
"""

DOWNLOAD_PATTERNS: Final = (
    *(f"*{suffix}" for suffix in sorted(SUFFIXES)),
    *("*LICEN[CS]E*", "*NOTICE*", "*COPYING*", "*USE_POLICY*"),
)
"""What to fetch of a repository on the Hub: companion files, indices of shards, and little else."""

_LEGAL_SUFFIXES: Final = frozenset({"", ".txt", ".md", ".rst"})
_LEGAL_STEM: Final = re.compile(r"(?:.*[-_.])?(?:licen[cs]es?|notices?|copying|use_policy)(?:[-_.].*)?", re.IGNORECASE)
_INDEX_OF_SHARDS: Final = re.compile(r".*\.(?:safetensors|bin|h5|msgpack)\.index(?:\.[\w-]+)?\.json", re.IGNORECASE)


def is_companion(name: str) -> bool:
    """Whether a file of this name, folders before it or not, is plain data by its name.

    Licences count, which must go where the weights go. Indices of shards do not: they belong to the weights.
    """
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    if suffix in _LEGAL_SUFFIXES and _LEGAL_STEM.fullmatch(path.stem):
        return True
    return suffix in SUFFIXES and not _INDEX_OF_SHARDS.fullmatch(path.name)
