"""What belongs to a task's weights as from_pretrained takes it: config, tokenizer, processor."""

from __future__ import annotations

import contextlib
import re
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from tallstore.errors import CompanionError
from tallstore.exporting import copy_companions
from tallstore.loading.bundle import Bundle
from tallstore.packing.companions import companions
from tallstore.transformers.library import BundleSource, library, opened, place, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG: Final = "config.json"

_PROCESSOR: Final = re.compile(r"(?:video_)?(?:pre)?processor_config\.json")
_TOKENIZER: Final = re.compile(  # as transformers 5 names them, and as older ones did
    r"(?:[a-z_]*tokenizer|(?:[a-z_]+[-_])?vocab|merges)[^/]*\.(?:json|txt)"
    r"|[^/]+\.(?:model|spm|tiktoken|vocab|bpe|codes|tokenizer)"
)
_Sort: TypeAlias = Callable[[str], object]


def tokenizer_from_bundle(bundle: BundleSource, task: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a task's expert, as ``AutoTokenizer.from_pretrained`` makes it: the task's own, else the base's.

    Its files are copied to a temporary directory, which stays as long as the tokenizer does.

    Args:
        bundle: an open bundle, which stays open; or what `open_bundle` takes.
        task: the expert's name.

    Raises:
        MissingExtraError: transformers 5 is not installed.
        CompanionError: there is no tokenizer, or one that cannot be loaded, or needs code of its own.
        UnknownTaskError, NotFetchedError, FormatError, IntegrityError, BaseError, InputError: as `Bundle.tensor`.
    """
    return _made(library().AutoTokenizer, bundle, task, "tokenizer", _TOKENIZER.fullmatch)


def processor_from_bundle(bundle: BundleSource, task: str) -> Any:  # noqa: ANN401 - transformers has no class for all
    """The processor of a task's expert, as ``AutoProcessor.from_pretrained`` makes it: the task's own, else the base's.

    That is a processor, an image processor or a feature extractor; of a model of text alone, its tokenizer. Arguments,
    errors and files are as for `tokenizer_from_bundle`.
    """
    return _made(library().AutoProcessor, bundle, task, "processor", _PROCESSOR.fullmatch, _TOKENIZER.fullmatch)


def _made(auto_class: Any, bundle: BundleSource, task: str, what: str, *sorts: _Sort) -> Any:  # noqa: ANN401
    """What one of transformers' automatic classes makes of the files beside a task's weights."""
    with contextlib.ExitStack() as files, opened(bundle) as found:
        directory = files.enter_context(beside(found, task, what, *sorts))
        with reading(place(found, task), f"its {what}"):
            made = auto_class.from_pretrained(directory, trust_remote_code=False)
        for part in (made, getattr(made, "tokenizer", None)):
            if part is not None and hasattr(part, "name_or_path"):
                part.name_or_path = str(found.path)
        weakref.finalize(made, files.pop_all().close)  # in another process, some tokenizers open their file again
    return made


@contextlib.contextmanager
def beside(bundle: Bundle, task: str, what: str, *sorts: _Sort, only: Collection[str] | None = None) -> Iterator[Path]:
    """A directory of what belongs to a task's weights: its own companion files, or the base's directory.

    They are the task's own if one of them is of the first of *sorts*, else the base's if one of those is; and so on
    with the next sort.

    Args:
        bundle: an open one.
        task: its name.
        what: is looked for, for the error.
        sorts: whether a file of some name makes the others worth having.
        only: names of the task's files that are needed; all by default.

    Raises:
        CompanionError: neither has a file of any sort.
        TallstoreError: as `copy_companions`, and as `Bundle.base_directory`.
    """
    own = bundle._expert(task).task  # noqa: SLF001 - this package's
    for sort in sorts:
        if any(sort(file.name) for file in own.table.files):
            with tempfile.TemporaryDirectory(prefix="tallstore-", ignore_cleanup_errors=True) as temporary:
                copy_companions(bundle, own, Path(temporary), only)
                yield Path(temporary)
            return
        base = bundle.base_directory
        if base is not None and any(map(sort, companions(base))):
            yield base
            return
    raise CompanionError(
        place(bundle, task), f"has no {what}, nor has its base; export the expert, and put the files beside its weights"
    )
