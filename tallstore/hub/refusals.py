"""Why the Hub's client failed, in a word: its own messages have several lines, and may quote a token."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Reason: TypeAlias = Literal[
    "gated",
    "no revision",
    "no repository",
    "invalid id",
    "no access",
    "stale parent",
    "busy",
    "unreachable",
    "other",
]


class Refusal(NamedTuple):
    """What went wrong.

    Attributes:
        reason: what kind of failure it is.
        status: of the Hub's answer, 0 without one.
        name: of the client's error.
    """

    reason: Reason
    status: int
    name: str


def refusal_of(error: Exception) -> Refusal:
    """What an error of huggingface_hub, or of what is below it, stands for. Never quotes it."""
    return Refusal(_reason(error), _status(error) or 0, type(error).__name__)


def _reason(error: Exception) -> Reason:
    from huggingface_hub import errors  # noqa: PLC0415 - takes long to import

    kinds: tuple[tuple[type[Exception], Reason], ...] = (
        (errors.GatedRepoError, "gated"),  # a repository that is not found, to its class
        (errors.RevisionNotFoundError, "no revision"),
        (errors.RepositoryNotFoundError, "no repository"),
        (errors.HFValidationError, "invalid id"),
    )
    for kind, reason in kinds:
        if isinstance(error, kind):
            return reason
    status = _status(error)
    if status in {401, 403}:
        return "no access"
    if status == 412:
        return "stale parent"
    if status is not None:
        return "busy"
    lost = isinstance(error, errors.LocalEntryNotFoundError) or is_transport_error(error)
    return "unreachable" if lost else "other"


def is_transport_error(error: Exception) -> bool:
    """Whether the connection is to blame, below the client, whichever library of HTTP it has; not what was asked."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "TransportError" in names and not names & {"LocalProtocolError", "UnsupportedProtocol"}


def _status(error: BaseException | None) -> int | None:
    """The status of the Hub's answer, which the client may have wrapped in another error."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None
