"""The header of a safetensors file, parsed strictly and without torch.

A file is an 8-byte little-endian length N, N bytes of JSON, and the tensors' data without holes. The safetensors
library accepts duplicate tensor names and unknown keys; this parser refuses whatever the format does not allow, so that
no two readers see two different files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, NoReturn, TypeGuard

from tallstore.format.dtypes import DTYPES, Dtype, is_dtype
from tallstore.format.quoting import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_HEADER_NBYTES: Final = 100_000_000
"""The longest JSON header that the safetensors library reads."""

LENGTH_NBYTES: Final = 8

_METADATA_KEY: Final = "__metadata__"
_ENTRY_KEYS: Final = frozenset({"dtype", "shape", "data_offsets"})
_MAX_DIMENSION: Final = 2**63 - 1
_MAX_SHOWN_DIMENSIONS: Final = 16
_quoted: Final = partial(quoted, limit=200)  # names of tensors are long

HeaderRule = Literal["ST-1", "ST-2", "ST-4"]


class HeaderProblem(ValueError):  # noqa: N818 - a finding; the module that knows the file makes it an error
    """A safetensors header that breaks the format.

    Attributes:
        rule: ``"ST-1"`` the header or one of its entries is malformed; ``"ST-2"`` the data has holes, overlaps or
            bytes beyond the last tensor, or the file ends early; ``"ST-4"`` the metadata is not text by text.
        problem: what is wrong, one line that names the tensor where it is about one; it reads on from a file's name.
    """

    def __init__(self, rule: HeaderRule, problem: str) -> None:
        super().__init__(f"{problem} [{rule}]")
        self.rule, self.problem = rule, problem


class UnknownDtypeProblem(HeaderProblem):
    """A tensor's data type is none that tallstore stores; the file may be a good one.

    Attributes:
        tensor: the tensor's name.
        dtype: the data type that the header gives.
    """

    def __init__(self, tensor: str, dtype: str) -> None:
        super().__init__("ST-1", f"has tensor {_quoted(tensor)} in {_quoted(dtype)}, not one of {', '.join(DTYPES)}")
        self.tensor, self.dtype = tensor, dtype


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its bytes are those from *start* to *stop*, counted from the beginning of the file."""

    dtype: Dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """A whole header.

    Attributes:
        tensors: by name, in the header's order.
        metadata: empty when the file has none.
        nbytes: bytes before the data: the length and the JSON, padding included.
    """

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    nbytes: int


def header_nbytes(start: bytes, file_size: int) -> int:
    """Bytes of the length and the JSON together, from the file's first 8 bytes.

    Args:
        start: the beginning of the file, 8 bytes or more.
        file_size: bytes of the whole file.

    Raises:
        HeaderProblem: ST-1, the length is over the limit; ST-2, the file is too short for it.
    """
    if min(file_size, len(start)) < LENGTH_NBYTES:
        raise HeaderProblem("ST-2", f"is truncated: {min(file_size, len(start))} bytes are no safetensors file")
    length = int.from_bytes(start[:LENGTH_NBYTES], "little")
    if length > MAX_HEADER_NBYTES:
        raise HeaderProblem("ST-1", f"gives a header of {length} bytes, over the limit of {MAX_HEADER_NBYTES}")
    if LENGTH_NBYTES + length > file_size:
        raise HeaderProblem("ST-2", f"is truncated: the header takes {length} bytes, the file has {file_size}")
    return LENGTH_NBYTES + length


def parse_header(raw: bytes, file_size: int) -> Header:
    """Parse the beginning of a file.

    Args:
        raw: the file's first bytes, at least to the end of the header (see `header_nbytes`); what follows is ignored.
        file_size: bytes of the whole file.

    Raises:
        HeaderProblem: for the first thing that breaks the format.
    """
    nbytes = header_nbytes(raw, file_size)
    if len(raw) < nbytes:
        raise HeaderProblem("ST-2", f"is truncated: the header ends at byte {nbytes}, {len(raw)} could be read")
    fields = _parse_object(raw[LENGTH_NBYTES:nbytes])
    metadata = _parse_metadata(fields.pop(_METADATA_KEY)) if _METADATA_KEY in fields else {}
    tensors = {name: _parse_entry(name, entry, nbytes, file_size) for name, entry in fields.items()}
    _check_contiguous(tensors, nbytes, file_size)
    return Header(tensors, metadata, nbytes)


def _parse_object(raw: bytes) -> dict[str, object]:
    # The format has the JSON begin with "{" and end with spaces only; json.loads would take any white space.
    if not raw.startswith(b"{") or not raw.rstrip(b" ").endswith(b"}"):
        raise HeaderProblem("ST-1", "has a header that is not a JSON object padded with spaces")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HeaderProblem("ST-1", f"has a header that is not UTF-8, from byte {error.start}") from None
    try:
        # An object, since it begins with "{".
        parsed: dict[str, object] = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except HeaderProblem:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, and integers of thousands of digits
        raise HeaderProblem("ST-1", f"has a header that is not JSON: {error}") from None
    return parsed


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise HeaderProblem("ST-1", f"has {_quoted(key)} twice in its header")
            seen.add(key)
    return found


def _refuse_constant(constant: str) -> NoReturn:
    raise HeaderProblem("ST-1", f"has a header that is not JSON: {constant} is no number there")


def _parse_metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise HeaderProblem("ST-4", f"has a {_METADATA_KEY} that is not an object")
    for key, value in metadata.items():
        if not (_is_text(key) and _is_text(value)):
            raise HeaderProblem("ST-4", f"has a {_METADATA_KEY} with something other than text at {_quoted(key)}")
    return metadata


def _parse_entry(name: str, entry: object, nbytes: int, file_size: int) -> Entry:
    tensor = f"tensor {_quoted(name)}"
    if not _is_text(name):
        raise HeaderProblem("ST-1", f"has {tensor}, whose name is not Unicode text")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise HeaderProblem("ST-1", f"describes {tensor} by other keys than dtype, shape and data_offsets")
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str):
        raise HeaderProblem("ST-1", f"gives {tensor} a dtype that is not text")
    if not _is_naturals(shape):
        raise HeaderProblem("ST-1", f"gives {tensor} a shape that is not a list of integers from 0 to 2^63 - 1")
    match entry["data_offsets"]:
        case [first, end] as offsets if _is_naturals(offsets) and first <= end:
            start, stop = nbytes + first, nbytes + end
        case _:
            raise HeaderProblem("ST-1", f"gives {tensor} data_offsets that are not two ascending integers from 0")
    if not is_dtype(dtype):
        raise UnknownDtypeProblem(name, dtype)
    if _payload_nbytes(shape, DTYPES[dtype], limit=stop) != stop - start:
        size = f"{dtype} {shape}" if len(shape) <= _MAX_SHOWN_DIMENSIONS else f"{len(shape)} dimensions"
        raise HeaderProblem("ST-1", f"gives {tensor} {stop - start} bytes, which is not the size of {size}")
    if stop > file_size:
        raise HeaderProblem("ST-2", f"is truncated: {tensor} ends at byte {stop}, the file has {file_size}")
    return Entry(dtype, tuple(shape), start, stop)


def _is_text(text: object) -> bool:
    # JSON can escape one half of a surrogate pair: such a string has no UTF-8.
    return isinstance(text, str) and (text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text))


def _is_naturals(numbers: object) -> TypeGuard[list[int]]:
    # `type(...) is int`: True and 1.0 equal 1 in Python, and the format allows neither.
    return isinstance(numbers, list) and all(type(item) is int and 0 <= item <= _MAX_DIMENSION for item in numbers)


def _payload_nbytes(shape: list[int], itemsize: int, *, limit: int) -> int:
    """Bytes of a tensor, or some number over *limit*: a million large dimensions are never multiplied out."""
    if 0 in shape:
        return 0
    nbytes = itemsize
    for dimension in shape:
        nbytes *= dimension
        if nbytes > limit:
            break
    return nbytes


def _check_contiguous(tensors: Mapping[str, Entry], nbytes: int, file_size: int) -> None:
    end = nbytes
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start > end:
            raise HeaderProblem("ST-2", f"has a hole of {entry.start - end} bytes before tensor {_quoted(name)}")
        if entry.start < end:
            raise HeaderProblem("ST-2", f"has tensor {_quoted(name)} begin {end - entry.start} bytes too early")
        end = entry.stop
    if end < file_size:
        raise HeaderProblem("ST-2", f"has {file_size - end} bytes after the last tensor")
