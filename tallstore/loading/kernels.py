"""Which forms the CPU decodes with a compiled function: those of which enough is decoded to be worth compiling it."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from tallstore.loading import decode_torch
from tallstore.loading.agreement import agree
from tallstore.loading.packed import NARROW, Form

if TYPE_CHECKING:
    from tallstore.loading.decode_llvm import Kernel

#: Elements of one form: torch takes some 2 ns longer for each of them; to load LLVM and compile a function takes 60 ms.
_WORTH_NUMEL: Final = 1 << 25


class Kernels:
    """This process's compiled functions; several threads may ask for them."""

    def __init__(self) -> None:
        self._found: dict[Form, Kernel | None] = {}
        self._asked = Counter[Form]()
        self._lock = threading.Lock()
        self._paused: Any = None  # llvmlite, whose lock a pause holds

    def expect(self, form: Form, numel: int) -> None:
        """Say that *numel* elements of a form are about to be decoded."""
        if form not in self._found:
            with self._lock:
                self._asked[form] += numel

    def kernel(self, form: Form) -> Kernel | None:
        """The function to decode elements with; None where torch and numpy are to.

        Cost: where enough elements are expected, or were, about 20 ms the first time, and once the import of llvmlite,
        about 30. What it makes of hard numbers is compared with what torch makes of them before it is used.
        """
        if form in self._found:
            return self._found[form]
        with self._lock:
            if form not in self._found and self._asked[form] >= _threshold():
                self._found[form] = _compiled(form)
            return self._found.get(form)

    def pause(self) -> None:
        """Wait until nothing is being compiled, nor anything freed that was, and let nothing begin."""
        self._lock.acquire()
        self._paused = sys.modules.get("llvmlite.binding.ffi")
        if self._paused is not None:
            self._paused.lib._lock.__enter__()  # noqa: SLF001 - what waits for a fork knows of no other way

    def go_on(self) -> None:
        """The end of a pause."""
        if self._paused is not None:
            self._paused.lib._lock.__exit__(None, None, None)  # noqa: SLF001
        self._lock.release()


def _threshold() -> float:
    """`TALLSTORE_COMPILE`, of the environment, is 0 for never and 1 for always."""
    return {"0": float("inf"), "1": 0}.get(os.environ.get("TALLSTORE_COMPILE", ""), _WORTH_NUMEL)


def _compiled(form: Form) -> Kernel | None:
    if not {form.base, form.result, form.wanted} <= NARROW:
        return None
    try:
        from tallstore.loading.decode_llvm import decode, kernel_of  # noqa: PLC0415 - llvmlite is an extra

        kernel = kernel_of(form)
        exact = agree(decode, decode_torch.decode, form)
    except Exception:  # noqa: BLE001 - not installed, or no compiler for this machine: torch can do it
        return None
    return kernel if exact else None


kernels: Final = Kernels()
if hasattr(os, "register_at_fork"):  # LLVM has locks of its own: a fork waits until nothing is being compiled
    os.register_at_fork(before=kernels.pause, after_in_parent=kernels.go_on, after_in_child=kernels.go_on)
