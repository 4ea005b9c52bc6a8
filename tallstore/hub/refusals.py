"""Why the Hub's client failed, in a word: its own messages have several lines, and may quote a token."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, TypeAlias

Reason: TypeAlias = Literal[
    "gated",
    "no revision",
    "no repository",
    "invalid id",
    "no access",
    "stale parent",
    "busy",
    "unreachable",
    "warning",
    "other",
]

_PASSING_STATUSES: Final = frozenset({408, 425, 429})
# Of the HTTP client below the Hub's: no answer came, or not to its end.
_PASSING_ERRORS: Final = frozenset({"TimeoutException", "NetworkError", "RemoteProtocolError"})
_UNREACHABLE: Final = _PASSING_ERRORS | {"LocalEntryNotFoundError", "ProxyError", "OfflineModeIsEnabled"}


class Refusal(NamedTuple):
    """What went wrong.

    Attributes:
        reason: what kind of failure it is.
        status: of the Hub's answer, 0 without one.
        name: of the client's error; of one that says nothing, also of its first cause.
    """

    reason: Reason
    status: int
    name: str


def refusal_of(error: Exception) -> Refusal:
    """What an error of huggingface_hub, or of what is below it, stands for. Never quotes it."""
    reason, name, cause = _reason(error), type(error).__name__, type(_first_cause(error)).__name__
    is_told = reason in {"other", "warning"} and cause != name
    return Refusal(reason, _status(error) or 0, f"{name}, from {cause}" if is_told else name)


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


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
    if _broke_off(error, frozenset({"Warning"})):
        return "warning"
    return "unreachable" if _broke_off(error, _UNREACHABLE) else "other"


def may_pass(error: Exception) -> bool:
    """Whether the same request may be answered a moment later."""
    status = _status(error)
    if status is not None:
        return status in _PASSING_STATUSES or status >= 500
    # A download was tried several times by the client itself before that is said.
    return _broke_off(error, _PASSING_ERRORS) and not _broke_off(error, frozenset({"LocalEntryNotFoundError"}))


def _broke_off(error: BaseException | None, kinds: frozenset[str]) -> bool:
    """Whether it is, or was caused by, an error of these classes, by their names: what library they are of, varies."""
    while error is not None:
        if any(kind.__name__ in kinds for kind in type(error).__mro__):
            return True
        error = error.__cause__
    return False


def _status(error: BaseException | None) -> int | None:
    """The status of the Hub's answer, which the client may have wrapped in another error."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None
