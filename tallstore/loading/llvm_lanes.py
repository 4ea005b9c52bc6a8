"""Several numbers at once in a function that LLVM compiles: arithmetic on them is written with Python's operators.

Importing this needs llvmlite, the extra `fast`. Nothing is fused, reordered or flushed: operations carry no fast-math
flags, without which LLVM keeps to IEEE 754.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

from llvmlite import ir

Value: TypeAlias = Any  # llvmlite has no types

I1: Final = ir.IntType(1)
I8: Final = ir.IntType(8)
I16: Final = ir.IntType(16)
I32: Final = ir.IntType(32)
I64: Final = ir.IntType(64)
F32: Final = ir.FloatType()
POINTER: Final = ir.PointerType()


class Lanes:
    """A number of one type, or several side by side; operators work on each of them, Python's numbers are for all."""

    def __init__(self, builder: ir.IRBuilder, value: Value) -> None:
        self.builder, self.value = builder, value

    # --- arithmetic ---

    def __add__(self, other: Lanes | float) -> Lanes:
        return self._made("fadd" if self._is_float else "add", other)

    def __sub__(self, other: Lanes | float) -> Lanes:
        return self._made("fsub" if self._is_float else "sub", other)

    def __mul__(self, other: Lanes | float) -> Lanes:
        return self._made("fmul" if self._is_float else "mul", other)

    def __and__(self, other: Lanes | int) -> Lanes:
        return self._made("and_", other)

    def __or__(self, other: Lanes | int) -> Lanes:
        return self._made("or_", other)

    def __xor__(self, other: Lanes | int) -> Lanes:
        return self._made("xor", other)

    def __lshift__(self, other: Lanes | int) -> Lanes:
        return self._made("shl", other)

    def __rshift__(self, other: Lanes | int) -> Lanes:
        """Zeros come in from above."""
        return self._made("lshr", other)

    def compare(self, how: str, other: Lanes | float) -> Lanes:
        """One bit each: ==, <, >= of whole numbers without a sign; == of others, which a NaN is not."""
        right = self._same(other).value
        if self._is_float:
            return Lanes(self.builder, self.builder.fcmp_ordered(how, self.value, right))
        return Lanes(self.builder, self.builder.icmp_unsigned(how, self.value, right))

    @property
    def is_nan(self) -> Lanes:
        """One bit each."""
        return Lanes(self.builder, self.builder.fcmp_unordered("uno", self.value, self.value))

    def choose(self, yes: Lanes, no: Lanes) -> Lanes:
        """*yes* where these bits are set, else *no*."""
        return Lanes(self.builder, self.builder.select(self.value, yes.value, no.value))

    # --- other types ---

    @property
    def as_float(self) -> Lanes:
        """The float32 of these bits."""
        return Lanes(self.builder, self.builder.bitcast(self.value, self._like(F32)))

    @property
    def as_bits(self) -> Lanes:
        """The bits of float32."""
        return Lanes(self.builder, self.builder.bitcast(self.value, self._like(I32)))

    def converted(self) -> Lanes:
        """Whole numbers with a sign in float32."""
        return Lanes(self.builder, self.builder.sitofp(self.value, self._like(F32)))

    def widened(self, element: Value = I32, *, signed: bool = False) -> Lanes:
        """Whole numbers in a wider type."""
        widen = self.builder.sext if signed else self.builder.zext
        return Lanes(self.builder, widen(self.value, self._like(element)))

    def narrowed(self, element: Value) -> Lanes:
        """The lowest bits."""
        return Lanes(self.builder, self.builder.trunc(self.value, self._like(element)))

    # --- making them ---

    def spread(self, count: int) -> Lanes:
        """One number, *count* times; itself for a count of 0."""
        if not count:
            return self
        kind = ir.VectorType(self.value.type, count)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), self.value, I32(0))
        zeros = ir.Constant(ir.VectorType(I32, count), [0] * count)
        return Lanes(self.builder, self.builder.shuffle_vector(one, one, zeros))

    def constants(self, numbers: Sequence[int]) -> Lanes:
        """A constant of this type: one number a lane."""
        return Lanes(self.builder, ir.Constant(self.value.type, list(numbers)))

    @property
    def _is_float(self) -> bool:
        kind = self.value.type
        return bool((kind.element if isinstance(kind, ir.VectorType) else kind) == F32)

    def _like(self, element: Value) -> Value:
        kind = self.value.type
        return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element

    def _same(self, other: Lanes | float) -> Lanes:
        if isinstance(other, Lanes):
            return other
        kind = self.value.type
        number = [other] * kind.count if isinstance(kind, ir.VectorType) else other
        return Lanes(self.builder, ir.Constant(kind, number))

    def _made(self, operation: str, other: Lanes | float) -> Lanes:
        make: Callable[[Value, Value], Value] = getattr(self.builder, operation)
        return Lanes(self.builder, make(self.value, self._same(other).value))


class Variable:
    """A number that loops change."""

    def __init__(self, builder: ir.IRBuilder, first: Value) -> None:
        self._builder = builder
        with builder.goto_entry_block():
            self._place = builder.alloca(first.type)
        builder.store(first, self._place)

    @property
    def value(self) -> Value:
        """What it is now."""
        return self._builder.load(self._place, typ=self._place.allocated_type)

    @value.setter
    def value(self, value: Value) -> None:
        self._builder.store(value, self._place)


def load(builder: ir.IRBuilder, pointer: Value, place: Value, element: Value, count: int = 0) -> Lanes:
    """Elements of memory that need not be aligned.

    Args:
        builder: of the function.
        pointer: to bytes.
        place: of the first one, in elements.
        element: their type.
        count: 0 for one number.
    """
    kind = ir.VectorType(element, count) if count else element
    return Lanes(builder, builder.load(_at(builder, pointer, place, element), align=1, typ=kind))


def store(builder: ir.IRBuilder, elements: Lanes, pointer: Value, place: Value) -> None:
    """As `load`, the other way."""
    kind = elements.value.type
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    builder.store(elements.value, _at(builder, pointer, place, element), align=1)


def _at(builder: ir.IRBuilder, pointer: Value, place: Value, element: Value) -> Value:
    return builder.gep(pointer, [place], source_etype=element)


@contextmanager
def repeated_while(builder: ir.IRBuilder, condition: Callable[[], Value]) -> Iterator[None]:
    """The block that runs as long as *condition* gives a set bit."""
    head, body, behind = (builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    builder.cbranch(condition(), body, behind)
    builder.position_at_end(body)
    yield
    builder.branch(head)
    builder.position_at_end(behind)


def least(builder: ir.IRBuilder, *numbers: Value) -> Value:
    """The smallest of whole numbers with a sign."""
    smallest = numbers[0]
    for number in numbers[1:]:
        smallest = builder.select(builder.icmp_signed("<", number, smallest), number, smallest)
    return smallest
