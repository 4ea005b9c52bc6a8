"""The algebra of the specification as a function that LLVM compiles for one form of elements: one pass, no temporaries.

Packed codes and values are unpacked in registers, eight elements at once; where fewer are left up to a row's end, or a
range begins inside of a byte, one by one. Casts are spelt out in whole numbers, and so are the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from llvmlite import ir

from tallstore.format.dtypes import Dtype, itemsize
from tallstore.format.manifest import SharedDtype
from tallstore.loading.llvm_lanes import (
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    POINTER,
    Lanes,
    Value,
    Variable,
    least,
    load,
    repeated_while,
    store,
)
from tallstore.loading.packed import SCALED, Form, Scaled

NAME: Final = "decode"
_LANES: Final = 8  # elements whose codes fill whole bytes at any width
_WORDS: Final = {1: I8, 2: I16, 4: I32}
_INTEGERS: Final = {1: I8, 2: I16, 4: I32, 8: I64}
_REGIONS: Final = ("destination", "base", "codes", "values", "values_lo", "centre")
_FURTHER: Final = ("offset", "count")

ARGUMENTS: Final = (
    *_REGIONS,
    *_FURTHER,
    *(f"{part} of {name}" for name in SCALED for part in ("scales", "left", "length")),
)
"""What the function takes: pointers, to the first element of the destination and the base and to the first one of the
chunk elsewhere, and to the scale of the first row; how far into the chunk the first element is, how many there are; how
many of them that row has, and how many each further one. Of a sparse tensor, values begin with the first element's."""


def module_of(form: Form) -> str:
    """LLVM's text of the function `NAME` for a form of which nothing is computed in float64; see `ARGUMENTS`."""
    module = ir.Module(name=NAME)
    kinds = [POINTER if name in _REGIONS or name.startswith("scales") else I64 for name in ARGUMENTS]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), name=NAME)
    function.args[ARGUMENTS.index("destination")].add_attribute("noalias")
    builder = ir.IRBuilder(function.append_basic_block())
    _Kernel(form, builder, dict(zip(ARGUMENTS, function.args, strict=True))).write()
    builder.ret_void()
    return str(module)


class _Rows:
    """The scale of the row that the function is at."""

    def __init__(self, builder: ir.IRBuilder, scales: Value, left: Value, length: Value) -> None:
        self._builder, self._length = builder, length
        self._scales, self.left = Variable(builder, scales), Variable(builder, left)

    def scale(self) -> Lanes:
        return load(self._builder, self._scales.value, I64(0), F32)

    def advance(self, count: Value) -> None:
        builder = self._builder
        left = builder.sub(self.left.value, count)
        ended = builder.icmp_signed("==", left, I64(0))
        following = builder.gep(self._scales.value, [I64(1)], source_etype=F32)
        self._scales.value = builder.select(ended, following, self._scales.value)
        self.left.value = builder.select(ended, self._length, left)


@dataclass(frozen=True)
class _Place:
    """Where elements are: in the chunk, and in destination and base; how many, 0 for a single one."""

    chunk: Value
    range: Value
    count: int


class _Kernel:
    def __init__(self, form: Form, builder: ir.IRBuilder, arguments: dict[str, Value]) -> None:
        self._form, self._builder, self._arguments = form, builder, arguments
        dtypes: dict[Scaled, SharedDtype | None] = {
            "values": form.values, "values_lo": form.values_lo, "centre": form.centre
        }  # fmt: skip
        self._dtypes = {name: dtype for name, dtype in dtypes.items() if dtype is not None}
        scaled = [name for name in SCALED if name == "values" or name in self._dtypes]
        self._rows = {
            name: _Rows(builder, *(arguments[f"{part} of {name}"] for part in ("scales", "left", "length")))
            for name in scaled
        }
        self._rank = Variable(builder, I64(0))

    def write(self) -> None:
        """A row, or what all scales have in common, after the other."""
        builder, offset = self._builder, self._arguments["offset"]
        stop = builder.add(offset, self._arguments["count"])
        place = Variable(builder, offset)
        with repeated_while(builder, lambda: builder.icmp_signed("<", place.value, stop)):
            ends = [builder.add(place.value, rows.left.value) for rows in self._rows.values()]
            end = least(builder, stop, *ends)
            length = builder.sub(end, place.value)
            self._write_run(place, end, {name: rows.scale() for name, rows in self._rows.items()})
            for rows in self._rows.values():
                rows.advance(length)

    def _write_run(self, place: Variable, end: Value, scales: dict[Scaled, Lanes]) -> None:
        """Elements of one scale, up to *end*."""
        builder = self._builder
        spread = {name: scale.spread(_LANES) for name, scale in scales.items()}
        with repeated_while(builder, lambda: builder.icmp_signed("<", place.value, end)):
            inside = builder.icmp_signed("!=", builder.and_(place.value, I64(_LANES - 1)), I64(0))
            whole = builder.select(inside, place.value, builder.and_(end, I64(-_LANES)))
            with repeated_while(builder, lambda: builder.icmp_signed("<", place.value, whole)):
                self._write_elements(self._at(place.value, _LANES), spread)
                if self._form.kind == "sparse":
                    self._write_set(place.value, scales)
                place.value = builder.add(place.value, I64(_LANES))
            border = least(builder, builder.add(builder.or_(place.value, I64(_LANES - 1)), I64(1)), end)
            with repeated_while(builder, lambda: builder.icmp_signed("<", place.value, border)):
                self._write_elements(self._at(place.value, 0), scales)
                place.value = builder.add(place.value, I64(1))

    def _write_set(self, start: Value, scales: dict[Scaled, Lanes]) -> None:
        """Those of eight elements whose bits are set, once more: all were written as if none were."""
        builder = self._builder
        bits = Variable(builder, self._word("codes", 1, start).widened(I64).value)
        with repeated_while(builder, lambda: builder.icmp_signed("!=", bits.value, I64(0))):
            lane = builder.cttz(bits.value, I1(1))
            self._write_elements(self._at(builder.add(start, lane), 0), scales)
            bits.value = builder.and_(bits.value, builder.sub(bits.value, I64(1)))

    def _at(self, place: Value, count: int) -> _Place:
        return _Place(place, self._builder.sub(place, self._arguments["offset"]), count)

    def _write_elements(self, place: _Place, scales: dict[Scaled, Lanes]) -> None:
        form = self._form
        base = self._loaded("base", place.range, _INTEGERS[itemsize(form.base)], place.count)
        bits = _cast(base, form.base, form.result)
        if form.kind != "same" and not (form.kind == "sparse" and place.count):
            delta = self._delta(place, scales)
            total = _value(base, form.base)
            if form.centre is not None:
                total += self._shared("centre", place) * scales["centre"]
            bits = delta.compare("==", 0.0).choose(bits, _rounded(total + delta, form.result))
        wanted = _cast(bits, form.result, form.wanted)
        store(self._builder, wanted, self._arguments["destination"], place.range)

    def _delta(self, place: _Place, scales: dict[Scaled, Lanes]) -> Lanes:
        form = self._form
        fields = self._unpacked("codes", form.code_width, place)
        if form.kind == "sparse":
            return self._own(fields) * scales["values"]
        if form.values is None:
            return _level(fields, form) * scales["values"]
        value = self._shared("values", place)
        if form.kind == "two-level":
            lower = self._shared("values_lo", place) * scales["values_lo"]
            return fields.compare("==", 1).choose(value * scales["values"], lower)
        if form.kind == "signed":
            value = (value.as_bits ^ ((fields >> 1) << 31)).as_float
        chosen = fields.compare("==", 0).choose(value.as_bits & 0, value.as_bits).as_float
        return chosen * scales["values"]

    def _unpacked(self, region: str, width: int, place: _Place) -> Lanes:
        """Packed fields of *width* bits, in int32."""
        builder, fields = self._builder, 8 // width
        if place.count:
            word = self._word(region, width, place.chunk).widened().spread(place.count)
            return (word >> word.constants([width * lane for lane in range(place.count)])) & ((1 << width) - 1)
        per_byte = fields.bit_length() - 1
        byte = self._loaded(region, builder.lshr(place.chunk, I64(per_byte)), I8, 0).widened()
        shift = builder.mul(builder.and_(place.chunk, I64(fields - 1)), I64(width))
        return (byte >> Lanes(builder, shift).narrowed(I32)) & ((1 << width) - 1)

    def _shared(self, region: Scaled, place: _Place) -> Lanes:
        """Values of a shared vector, float32."""
        dtype = self._dtypes[region]
        if dtype == "LOG4":
            code = self._unpacked(region, 4, place)
            odd = code & 1  # 181/256 is 2^-1 times 1 + 0x350000 / 2^23
            exponent = (code >> 1) + odd
            return (((odd * 0x350000) + (127 << 23)) - (exponent << 23)).as_float
        return self._number(region, dtype, place.chunk, place.count)

    def _number(self, region: Scaled, dtype: SharedDtype, place: Value, count: int) -> Lanes:
        """Stored numbers that take whole bytes, float32."""
        if dtype == "LOG4":
            raise AssertionError("two codes of LOG4 take a byte")
        elements = self._loaded(region, place, _INTEGERS[itemsize(dtype)], count)
        return elements.widened(signed=True).converted() if dtype == "I8" else _value(elements, dtype)

    def _word(self, region: str, width: int, place: Value) -> Lanes:
        """The packed fields of eight elements."""
        return self._loaded(region, self._builder.lshr(place, I64(3)), _WORDS[width], 0)

    def _own(self, field: Lanes) -> Lanes:
        """The next value of a sparse tensor for a set bit, 0 else: float32."""
        builder, dtype = self._builder, self._dtypes["values"]
        chosen = Variable(builder, F32(0.0))
        with builder.if_then(field.compare("==", 1).value):
            chosen.value = self._number("values", dtype, self._rank.value, 0).value
            self._rank.value = builder.add(self._rank.value, I64(1))
        return Lanes(builder, chosen.value)

    def _loaded(self, region: str, place: Value, element: Value, count: int) -> Lanes:
        return load(self._builder, self._arguments[region], place, element, count)


def _level(fields: Lanes, form: Form) -> Lanes:
    """What the codes of signs and of uniform fields stand for, float32."""
    if form.kind == "sign":
        return (fields + fields - 1).converted()
    if form.levels == 3:
        return (fields - 1).converted()
    return fields.converted() - (form.levels - 1) / 2


def _value(element: Lanes, dtype: Dtype) -> Lanes:
    """Stored elements in float32, which holds them exactly."""
    if dtype == "F32":
        return element.as_float
    bits = element.widened()
    if dtype == "BF16":
        return (bits << 16).as_float
    magnitude, sign = bits & 0x7FFF, (bits & 0x8000) << 16
    wide = (magnitude << 13) + (112 << 23)  # the exponent's bias is 112 more
    subnormal = ((wide + (1 << 23)).as_float - 2.0**-14).as_bits
    wide = magnitude.compare("<", 0x0400).choose(subnormal, wide)
    wide = magnitude.compare(">=", 0x7C00).choose(wide | 0x7F800000, wide)
    return (wide | sign).as_float


def _cast(bits: Lanes, source: Dtype, dtype: Dtype) -> Lanes:
    """The bits of elements in another dtype; as they are in their own."""
    return bits if source == dtype else _rounded(_value(bits, source), dtype)


def _rounded(number: Lanes, dtype: Dtype) -> Lanes:
    """The bits of float32 in *dtype*, rounded to nearest, ties to even."""
    bits = number.as_bits
    if dtype == "F32":
        return bits
    if dtype == "BF16":
        upper = bits >> 16
        nearest = (bits + 0x7FFF + (upper & 1)) >> 16
        return number.is_nan.choose(upper | 0x40, nearest).narrowed(I16)
    sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112 << 23)) >> 13
    subnormal = (magnitude.as_float + 0.5).as_bits - (126 << 23)  # the sum's last bit is 2^-24
    half = magnitude.compare("<", 113 << 23).choose(subnormal, normal)
    half = magnitude.compare(">=", 143 << 23).choose((half & 0) | 0x7C00, half)
    half = number.is_nan.choose(half | 0x7E00, half)
    return (half | sign).narrowed(I16)
