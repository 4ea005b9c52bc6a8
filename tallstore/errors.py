"""Every error that tallstore raises on purpose.

    TallstoreError
    ├── FormatError                 a bundle breaks a rule of the specification
    │   ├── IntegrityError          bytes are not the ones that were written
    │   ├── UnsupportedVersionError a format version that this reader does not read
    │   └── UnsupportedFeatureError a required feature that this reader does not have
    ├── BaseError                   the base that an expert is rebuilt on
    │   ├── BaseMissingError        none is embedded, referred to, or given
    │   └── BaseMismatchError       not the base that the bundle was packed from
    ├── UnknownNameError            (also a KeyError)
    │   ├── UnknownTaskError
    │   └── UnknownTensorError
    ├── NotFetchedError             a task of the bundle whose files are not here
    ├── BundleNotFoundError         no bundle at that path, or of that id on the Hub
    ├── BundleChangedError          the bundle that was opened is another by now
    ├── HubError                    the Hub refuses, or cannot be reached
    │   ├── HubAccessError          no token, or one that may not do that
    │   └── HubConflictError        somebody else pushed in the meantime
    ├── CardError                   the model card, README.md, that cannot be read or is refused
    ├── InputError                  a checkpoint that cannot be packed
    │   ├── CheckpointNotFoundError
    │   ├── DamagedCheckpointError  truncated, or no tensor file at all
    │   ├── UnsafeCheckpointError   a pickle that holds more than plain weights
    │   ├── QuantizedCheckpointError
    │   ├── AdapterCheckpointError  a PEFT adapter that was not merged
    │   ├── NameMismatchError       base and expert have no tensor name in common
    │   ├── NonFiniteError          NaN or infinity where weights would be coded
    │   └── TooFewExpertsError
    ├── OptionError                 (also a ValueError) an argument outside its range
    ├── CompanionError              a config or tokenizer that is missing, or that its library does not take
    ├── TooLargeError               (also a MemoryError) more than the machine has memory for
    ├── SwitchError                 a model that is neither of two experts
    ├── MissingExtraError           (also an ImportError) a library that only an extra installs
    ├── WorkerError                 work that was given to an executor did not come back
    └── OutputError                 the place to write to
        ├── OutputExistsError
        ├── OutputInsideInputError
        └── OutputBusyError         another process is writing there

Messages are one line: where, what is wrong, and what to do about it. What they quote may come from a file that somebody
else made: what no terminal should print is escaped, and what is endless is cut.
"""

from __future__ import annotations

import difflib
import itertools
import re
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

_PACKAGE: Final = Path(__file__).parent
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MAX_PLACE: Final = 1000
_MAX_PROBLEM: Final = 2500
_MAX_MESSAGE: Final = 4000
# To compare a million long names with one that is not among them would take hours.
_MAX_COMPARED_NAME: Final = 256
_MAX_COMPARED: Final = 200_000


def one_line(text: str, limit: int = _MAX_MESSAGE) -> str:
    """*text* as one line that a terminal can show, of at most *limit* characters: the rest is cut, and escaped."""
    shown = text if len(text) <= limit else f"{text[: limit - 1]}…"
    line = _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], shown)
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


class TallstoreError(Exception):
    """The root of every error that tallstore raises on purpose. Each can be pickled: workers send them home."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))

    def __reduce__(self) -> tuple[Any, ...]:
        """Not by the arguments of the class, of which the message was made."""
        return _restored, (type(self), self.args, self.__dict__)

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of every frame: the caller's own line, and what is wrong."""
        frames = itertools.takewhile(_is_outside, traceback.extract_tb(self.__traceback__))
        lines = [f"line {frame.lineno}: {frame.line}" for frame in list(frames)[-1:] if frame.line]
        return [*lines, f"{type(self).__name__}: {self}"]


def _is_outside(frame: traceback.FrameSummary) -> bool:
    return _PACKAGE not in Path(frame.filename).parents


def _restored(kind: type[TallstoreError], args: tuple[object, ...], state: dict[str, object]) -> TallstoreError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class FormatError(TallstoreError):
    """A bundle breaks a rule of the specification.

    Attributes:
        rule: the rule's id in ``spec/tallstore-1.md``, such as ``"IDX-3"``.
        where: the file, and the tensor or key in it.
        problem: what is wrong there.
    """

    def __init__(self, rule: str, where: str, problem: str) -> None:
        where, problem = one_line(where, _MAX_PLACE), one_line(problem, _MAX_PROBLEM)
        super().__init__(f"{where}: {problem} [{rule}]")
        self.rule, self.where, self.problem = rule, where, problem


class IntegrityError(FormatError):
    """Bytes of a bundle are not the ones that were written."""


class UnsupportedVersionError(FormatError):
    """The bundle's format version is not one that this reader reads."""


class UnsupportedFeatureError(FormatError):
    """The bundle requires a feature that this reader does not have."""


class BaseError(TallstoreError):
    """Something is wrong with the base that experts are rebuilt on."""


class BaseMissingError(BaseError):
    """The bundle neither embeds nor names its base, and none was given."""


class BaseMismatchError(BaseError):
    """The base is not the one that the bundle was packed from.

    Attributes:
        rule: ``"BASE-1"`` (missing, other dtype or shape) or ``"BASE-2"`` (other bytes).
        tensor: the first tensor that differs.
    """

    def __init__(self, rule: str, where: str, tensor: str, problem: str) -> None:
        super().__init__(
            f"{where}: tensor {tensor!r} {problem}; open the bundle with the base that it was packed from [{rule}]"
        )
        self.rule, self.where, self.tensor, self.problem = rule, where, tensor, problem


class UnknownNameError(TallstoreError, KeyError):
    """A name that is not there; the message suggests the nearest one."""

    __str__ = Exception.__str__  # KeyError would print the message's repr

    def __init__(self, where: str, noun: str, name: str, known: Iterable[str]) -> None:
        names = list(known)
        near = difflib.get_close_matches(name[:_MAX_COMPARED_NAME], _comparable(names), n=1)
        if near:
            hint = f"did you mean {near[0]!r}?"
        elif names:
            shown = ", ".join(repr(known_name[:_MAX_COMPARED_NAME]) for known_name in names[:5])
            hint = f"there are {len(names)}: {shown}{', …' if len(names) > 5 else ''}"
        else:
            hint = "there are none"
        super().__init__(f"{where}: no {noun} named {name!r}; {hint}")
        self.name = name


def _comparable(names: Iterable[str]) -> list[str]:
    """The first of *names* that take about a second to be compared with another."""
    short = [name for name in names if len(name) <= _MAX_COMPARED_NAME]
    lengths = itertools.accumulate(map(len, short))
    return [name for name, length in zip(short, lengths, strict=True) if length <= _MAX_COMPARED]


class UnknownTaskError(UnknownNameError):
    """No task of that name is in the bundle."""


class UnknownTensorError(UnknownNameError):
    """No tensor of that name is in the task."""


class NotFetchedError(TallstoreError):
    """The task is in the bundle, but its files are not here."""


class BundleNotFoundError(TallstoreError):
    """There is no bundle at that path, or of that id on the Hub."""


class BundleChangedError(TallstoreError):
    """A file is gone, or another, because the bundle was changed after it was opened; opening it again helps."""


class HubError(TallstoreError):
    """The Hub refuses, or cannot be reached.

    Attributes:
        where: the repository, and its revision where one was given.
    """

    def __init__(self, where: str, problem: str) -> None:
        where, problem = one_line(where, _MAX_PLACE), one_line(problem, _MAX_PROBLEM)
        super().__init__(f"{where}: {problem}")
        self.where, self.problem = where, problem


class HubAccessError(HubError):
    """No token was given, or one that may not do that."""


class HubConflictError(HubError):
    """Somebody else pushed in the meantime."""


class CardError(TallstoreError):
    """The model card, README.md, cannot be read, or the Hub refuses it.

    Attributes:
        where: the file, and the repository where it is there.
    """

    def __init__(self, where: str, problem: str) -> None:
        where, problem = one_line(where, _MAX_PLACE), one_line(problem, _MAX_PROBLEM)
        super().__init__(f"{where}: {problem}")
        self.where, self.problem = where, problem


class InputError(TallstoreError):
    """A checkpoint that cannot be packed.

    Attributes:
        where: the checkpoint, and its file where there is one; for an expert, its task comes first.
    """

    def __init__(self, where: str, problem: str) -> None:
        where, problem = one_line(where, _MAX_PLACE), one_line(problem, _MAX_PROBLEM)
        super().__init__(f"{where}: {problem}")
        self.where, self.problem = where, problem


class CheckpointNotFoundError(InputError):
    """There is no checkpoint at that path or Hub id."""


class DamagedCheckpointError(InputError):
    """A checkpoint's file is truncated, malformed or missing."""


class UnsafeCheckpointError(InputError):
    """A pickle that holds more than plain weights; it was not executed."""


class QuantizedCheckpointError(InputError):
    """Weights quantised by GPTQ, AWQ, bitsandbytes or the like."""


class AdapterCheckpointError(InputError):
    """A PEFT adapter folder: a difference, not a model."""


class NameMismatchError(InputError):
    """Base and expert have no tensor name in common, or a mapping makes two names one."""


class NonFiniteError(InputError):
    """NaN or infinity in a tensor that would be coded."""


class TooFewExpertsError(InputError):
    """A merged method was given fewer than two experts."""


class OptionError(TallstoreError, ValueError):
    """An argument is outside its range."""


class CompanionError(TallstoreError):
    """What belongs to an expert's weights (config, tokenizer, processor) is missing, or its library does not take it.

    Attributes:
        where: the bundle, and the task.
    """

    def __init__(self, where: str, problem: str) -> None:
        where, problem = one_line(where, _MAX_PLACE), one_line(problem, _MAX_PROBLEM)
        super().__init__(f"{where}: {problem}")
        self.where, self.problem = where, problem


class TooLargeError(TallstoreError, MemoryError):
    """More bytes are asked for than the machine has memory."""


class SwitchError(TallstoreError):
    """A switch failed halfway and could not be undone: the model is neither the old expert nor the new one."""


class MissingExtraError(TallstoreError, ImportError):
    """A library that only an extra installs is not there."""

    def __init__(self, what: str, library: str, extra: str) -> None:
        super().__init__(f"{what} needs {library}: pip install 'tallstore[{extra}]'")


class WorkerError(TallstoreError):
    """Work that was given to an executor did not come back: a worker died, or the work could not be sent."""


class OutputError(TallstoreError):
    """Something is wrong with the place to write to."""


class OutputExistsError(OutputError):
    """The output is there already."""


class OutputInsideInputError(OutputError):
    """The output lies inside one of the inputs, or an input inside the output."""


class OutputBusyError(OutputError):
    """Another process is writing to the same output."""
