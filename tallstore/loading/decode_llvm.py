"""Packed elements to weights in a function that LLVM compiles for their form on the CPU. Importing this needs llvmlite.

Such a function lets go of the interpreter's lock once a chunk, where torch's and numpy's operations do so ten times a
tile: threads that decode side by side do not wait for each other.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, Final, TypeAlias

import llvmlite
import llvmlite.binding as llvm
import torch

from tallstore.format.encodings import SHARED
from tallstore.loading.llvm_kernel import ARGUMENTS, NAME, module_of
from tallstore.loading.packed import BLOCK_NUMEL, COLUMNS, SCALED, Form, Packed
from tallstore.loading.subnormals import subnormals_count

_OLDEST: Final = (0, 46)
if tuple(map(int, llvmlite.__version__.split(".")[:2])) < _OLDEST:
    raise ImportError(f"llvmlite is {llvmlite.__version__}; compiled functions need 0.46 or newer")

_HOLDING_NUMEL: Final = 1 << 13  # to wait for the interpreter's lock takes longer than to decode so few
_KINDS: Final = [ctypes.c_int64] * len(ARGUMENTS)
_COUNT: Final = ARGUMENTS.index("count")
_Call: TypeAlias = Callable[..., None]


class Kernel:
    """The compiled function of one form; several threads may use it."""

    def __init__(self, form: Form) -> None:
        """Compile it, in about 20 ms.

        Raises:
            Exception: whatever LLVM has against this machine.
        """
        with _lock:
            machine = _machine()
            module = llvm.parse_assembly(module_of(form))
            passes = llvm.create_new_function_pass_manager()
            passes.add_sroa_pass()  # variables to registers; all else is written as it is to be
            builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options())
            passes.run(module.get_function(NAME), builder)
            self._engine = llvm.create_mcjit_compiler(module, machine)
            self._engine.finalize_object()
            address = self._engine.get_function_address(NAME)
        self._releasing: _Call = ctypes.CFUNCTYPE(None, *_KINDS)(address)
        self._holding: _Call = ctypes.PYFUNCTYPE(None, *_KINDS)(address)

    def __call__(self, *arguments: int) -> None:
        """Write elements; the caller sees to it that all memory is there.

        Args:
            arguments: as `ARGUMENTS`; pointers as addresses.
        """
        call = self._holding if arguments[_COUNT] < _HOLDING_NUMEL else self._releasing
        with subnormals_count():
            call(*arguments)


@cache
def kernel_of(form: Form) -> Kernel:
    """The function of a form, compiled once.

    Raises:
        Exception: as `Kernel`.
    """
    return Kernel(form)


def decode(packed: Packed) -> None:
    """Write every piece to its destination, as if the CPU were another device; see `Decode`."""
    packed = packed.together()
    kernel, form = kernel_of(packed.form), packed.form
    table = packed.region("table", torch.int64).view(-1, COLUMNS).tolist()
    scales = packed.regions["scales"].data_ptr()
    for piece in table:
        address, count, first_block = piece[:3]
        first = first_block * BLOCK_NUMEL
        places = {
            name: packed.regions[name].data_ptr() + first * width // 8 if width else 0
            for name, width in form.widths.items()
        }
        if form.values is not None and form.kind == "sparse":
            rank = int(packed.region("ranks", torch.int32)[first_block])
            places["values"] = packed.regions["values"].data_ptr() + rank * SHARED[form.values].itemsize
        rows = []
        for index in range(len(SCALED)):
            place, left, length = piece[3 + 3 * index : 6 + 3 * index]
            rows += [scales + 4 * place, left or count, length or count]
        regions = (places.get(name, 0) for name in ("base", "codes", "values", "values_lo", "centre"))
        kernel(address, *regions, 0, count, *rows)


_lock: Final = threading.Lock()


@cache
def _host() -> tuple[Any, str, str]:
    """This machine: what LLVM makes code for."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def _machine() -> Any:  # noqa: ANN401 - llvmlite has no types
    target, cpu, features = _host()
    return target.create_target_machine(cpu=cpu, features=features)
