"""What loading a pickle would cost, told from its instructions alone: a short one can stand for a great deal.

`torch.load` executes nothing but what it knows to be harmless, yet a tuple of twice the tuple before, forty times over,
takes hours to hash, text that is encoded as hexadecimal digits again and again any memory, and so does a bytearray of a
given length. Here every value has a weight: how many values, characters and bytes there are in it, those counted
again that are in it twice.
"""

from __future__ import annotations

import pickletools
from typing import TYPE_CHECKING, BinaryIO, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Weights add up to a few for each byte in what `torch.save` writes; values that are used again have more.
_WEIGHT_A_BYTE: Final = 64
_FREE_WEIGHT: Final = 1 << 20
#: How many times as long as its text an encoding can be, at the most.
_ENCODED: Final = 10
_GROWING: Final = frozenset({"_codecs encode", "torch._tensor _rebuild_from_type_v2"})
#: What takes room or time by numbers in the pickle and not by its length, though torch allows it.
_UNBOUNDED: Final = frozenset(
    {
        "__builtin__ bytearray",
        "builtins bytearray",
        "torch._utils _rebuild_device_tensor_from_cpu_tensor",
        "torch._utils _rebuild_device_tensor_from_numpy",
        "torch._utils _rebuild_nested_tensor",
        "torch._utils _rebuild_sparse_tensor",
        "torch._utils _rebuild_wrapper_subclass",
    }
)


class CostlyPickleError(ValueError):
    """Loading it may take any time or memory; the text says what it has, for a message."""


class _Value:
    """What lies on the stack: its weight, and the name of what is no value but a function or class."""

    __slots__ = ("name", "weight")

    def __init__(self, weight: int = 1, name: str = "") -> None:
        self.weight, self.name = weight, name


def refuse_costly(pickle: BinaryIO) -> None:
    """Read one pickle up to its end, and see what its values weigh. Nothing is made of them.

    What is no pickle, or ends too early, is not refused: whoever loads it says so.

    Args:
        pickle: at its first byte; left behind its last.

    Cost:
        a microsecond or two for each instruction, of which a tensor has some thirty.

    Raises:
        CostlyPickleError: it asks for more than is in proportion to its length.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            machine.step(opcode, argument, pickle.tell())
    except CostlyPickleError:
        raise
    except Exception:  # noqa: BLE001 - what is no pickle makes the parser raise anything
        return


class _Machine:
    """The stack and the memo of an unpickler, of weights alone."""

    def __init__(self) -> None:
        self._limit, self._spent = _FREE_WEIGHT, 0
        self._stack: list[_Value] = []
        self._memo: dict[int, _Value] = {}
        self._mark = _Value()

    def step(self, opcode: pickletools.OpcodeInfo, argument: object, nbytes: int) -> None:
        """Do what an instruction does, after *nbytes* of the file.

        Raises:
            CostlyPickleError: as `refuse_costly`.
            IndexError, KeyError: there is not on the stack, or in the memo, what it takes.
        """
        self._limit = _FREE_WEIGHT + _WEIGHT_A_BYTE * nbytes
        match opcode.name:
            case "MARK":
                self._stack.append(self._mark)
            case "PUT" | "BINPUT" | "LONG_BINPUT" if isinstance(argument, int):
                self._memo[argument] = self._stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET" if isinstance(argument, int):
                self._stack.append(self._memo[argument])
            case "GLOBAL":
                self._push(1, self._known(str(argument)))
            case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS" | "ADDITEMS" | "BUILD":
                items = self._pop(opcode)
                container = items.pop(0)
                container.weight += self._spend(items)
                self._stack.append(container)
            case "REDUCE" | "NEWOBJ":
                function, *arguments = self._pop(opcode)
                weight = self._spend(arguments)
                self._push(weight * _ENCODED if function.name in _GROWING else weight)
            case "BINPERSID":
                self._pop(opcode)
                self._push(1)
            case _:
                within = sum(item.weight for item in self._pop(opcode))
                own = len(argument) if isinstance(argument, (str, bytes)) else 0
                for _ in opcode.stack_after:
                    self._push(1 + own + within)

    def _pop(self, opcode: pickletools.OpcodeInfo) -> list[_Value]:
        """What an instruction takes, the lowest first, without the mark."""
        before = opcode.stack_before
        items: list[_Value] = []
        if pickletools.markobject in before:
            while (item := self._stack.pop()) is not self._mark:
                items.append(item)
            before = before[: before.index(pickletools.markobject)]
        items.extend(self._stack.pop() for _ in before)
        return items[::-1]

    def _push(self, weight: int, name: str = "") -> None:
        if weight > self._limit:
            raise CostlyPickleError("stands for far more than it holds")
        self._stack.append(_Value(weight, name))

    def _spend(self, items: Iterable[_Value]) -> int:
        """What the loader looks at once more: it hashes keys, and calls functions with arguments."""
        weight = sum(item.weight for item in items)
        self._spent += weight
        if self._spent > self._limit:
            raise CostlyPickleError("stands for far more than it holds")
        return weight

    @staticmethod
    def _known(name: str) -> str:
        if name in _UNBOUNDED:
            raise CostlyPickleError(f"refers to {name.replace(' ', '.')}, more than plain weights")
        return name
