"""The library itself, and its errors as ours."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Final, TypeAlias

import torch

from tallstore.errors import CompanionError, MissingExtraError, TallstoreError
from tallstore.loading.bundle import Bundle, open_bundle

BundleSource: TypeAlias = Bundle | str | os.PathLike[str]

_OLDEST_MAJOR: Final = 5  # the first whose loader asks for one weight after the other


def library() -> ModuleType:
    """The package ``transformers``.

    Raises:
        MissingExtraError: it is not installed, or too old.
    """
    try:
        found = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError("tallstore.transformers", "transformers", "transformers") from error
    if int(found.__version__.partition(".")[0]) < _OLDEST_MAJOR:
        raise MissingExtraError("tallstore.transformers", "transformers 5 or newer", "transformers")
    return found


@contextlib.contextmanager
def opened(bundle: BundleSource) -> Iterator[Bundle]:
    """An open bundle, which stays open; or what `open_bundle` takes, opened until the end."""
    if isinstance(bundle, Bundle):
        yield bundle
        return
    with open_bundle(bundle) as found:
        yield found


def place(bundle: Bundle, task: str) -> str:
    """What messages call a task."""
    return f"{bundle.path}: task {task!r}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


@contextlib.contextmanager
def reading(where: str, what: str) -> Iterator[None]:
    """Whatever is raised because of files from elsewhere becomes a `CompanionError`, which are no bugs of anybody's.

    Raises:
        CompanionError: in the place of any other error, but for ours and for want of memory.
    """
    try:
        yield
    except (TallstoreError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which is never run; export the expert, and load it as its makers say"
        raise CompanionError(where, f"{what} cannot be loaded: {reason}") from error
