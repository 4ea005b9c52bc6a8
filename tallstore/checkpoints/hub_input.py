"""Models of the Hugging Face Hub as inputs: one commit, its configuration, and only the weights that will be read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from tallstore.checkpoints.checkpoint import HubRef
from tallstore.checkpoints.companion_names import DOWNLOAD_PATTERNS
from tallstore.checkpoints.directory import STANDARD_FILES, shard_names
from tallstore.checkpoints.refusals import refuse_by_config
from tallstore.errors import CheckpointNotFoundError, InputError
from tallstore.hub.bars import bar_class
from tallstore.hub.refusals import Reason, refusal_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tallstore.hub.pinned import Access


def download(repo_id: str, revision: str | None, access: Access, *, typed: bool) -> tuple[Path, HubRef]:
    """Download the weights of a model and what lies beside them into the Hub's cache; what is there is not sent again.

    Safetensors are preferred: pickles are downloaded only where there is no standard safetensors file.

    Args:
        repo_id: ``"org/name"``.
        revision: a branch, a tag or a commit.
        access: how the Hub is reached.
        typed: whether somebody typed the id, who may have meant a path.

    Returns:
        The directory, and the commit that *revision* (by default ``main``) stands for.

    Raises:
        CheckpointNotFoundError: no such repository or revision, or none that the token may see.
        AdapterCheckpointError, QuantizedCheckpointError: its configuration says so; weights are not downloaded.
        InputError: the Hub cannot be reached and the cache has not everything, or access is refused.
    """
    where = f"{repo_id}@{revision}" if revision else repo_id
    try:
        directory = _snapshot(repo_id, revision, access, DOWNLOAD_PATTERNS)
    except Exception as error:  # noqa: BLE001 - as in `_hub_error`
        raise _hub_error(where, error, typed=typed) from None
    refuse_by_config(where, directory)
    ref = HubRef(repo_id, directory.name)  # the cache keeps a snapshot in a directory of its commit's name
    names = _weight_names(where, directory, _file_names(ref, access, directory))
    try:
        _snapshot(repo_id, ref.revision, access, names)
    except Exception as error:  # noqa: BLE001
        raise _hub_error(where, error, typed=False) from None
    return directory, ref


def _weight_names(where: str, directory: Path, available: frozenset[str]) -> list[str]:
    """The files that `find_weights` will read, once they are there."""
    for index_name, single in STANDARD_FILES:
        if (directory / index_name).is_file():
            return sorted(set(shard_names(directory / index_name).values()))
        if single in available:
            return [single]
    names = sorted(name for name in available if name.endswith(".safetensors") and "/" not in name)
    if not names:
        raise InputError(where, "has no .safetensors file and no pytorch_model.bin; give a model with weights")
    if len(names) > 1:
        raise InputError(
            where, f"has {len(names)} .safetensors files and no index of shards; download one, and give its path"
        )
    return names


def _file_names(ref: HubRef, access: Access, directory: Path) -> frozenset[str]:
    import huggingface_hub  # noqa: PLC0415 - takes long to import, and few inputs are on the Hub

    if not access.is_offline:
        try:
            return frozenset(huggingface_hub.list_repo_files(ref.repo_id, revision=ref.revision, token=access.token))
        except Exception:  # noqa: BLE001, S110 - what was downloaded before may be all that is needed
            pass
    return frozenset(path.name for path in directory.glob("*"))


def _snapshot(repo_id: str, revision: str | None, access: Access, patterns: Sequence[str]) -> Path:
    import huggingface_hub  # noqa: PLC0415

    return Path(
        huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            token=access.token,
            cache_dir=access.cache_dir,
            local_files_only=access.local_files_only,
            allow_patterns=list(patterns),
            tqdm_class=bar_class(),
        )
    )


_KINDS: Final[dict[Reason, type[InputError]]] = {
    "no revision": CheckpointNotFoundError,
    "no repository": CheckpointNotFoundError,
    "invalid id": CheckpointNotFoundError,
}
_PROBLEMS: Final[dict[Reason, str]] = {
    "gated": "is a gated model; accept its terms on the Hub, and give the token of that account",
    "no revision": "the Hub has that model, but no such revision; give another",
    "no repository": "no such model on the Hub; a private one needs a token (`hf auth login`)",
    "invalid id": "no valid id of a model on the Hub",
    "no access": "the Hub refuses access (HTTP {status}); give a token that may read this model",
    "busy": "the Hub answers with HTTP {status}; try again later",
    "unreachable": "the Hub cannot be reached, and its cache here does not have the whole model",
    "other": "cannot be downloaded from the Hub ({name}); try again, or give a local directory",
}


_NO_PATH: Final[dict[Reason, str]] = {
    "no repository": "no such path here, and ",
    "invalid id": "no such path here, and ",
    "unreachable": "no such path here; ",
}


def _hub_error(where: str, error: Exception, *, typed: bool) -> InputError:
    """The error of one line for one of the client's.

    Its messages have several lines, and those of the HTTP client below it may quote the request's headers, where the
    token is: none is passed on.
    """
    refusal = refusal_of(error)
    problem = _PROBLEMS[refusal.reason].format(status=refusal.status, name=refusal.name)
    if typed:
        problem = _NO_PATH.get(refusal.reason, "") + problem
    return _KINDS.get(refusal.reason, InputError)(where, problem)
