"""A process in which Triton interprets kernels on the CPU, or compiles them: what it does is chosen at its import."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from tallstore.loading.device_decoders import computes_exactly
from tallstore.loading.packed import Packed
from tests.device_cases import decoded, remembered


@contextlib.contextmanager
def triton_process(**environment: str) -> Iterator[ProcessPoolExecutor]:
    """One process of its own, with these variables in its environment."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _begin, (environment,)) as process:
        yield process


def _begin(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)


def interpret(root: Path, wanted: str | None = None, *, kept: bool = False) -> dict[str, bytes]:
    """The bytes of every tensor of the task "t", decoded by the kernel; of the coded ones, where all is kept."""
    from tallstore.loading.decode_triton import decode  # noqa: PLC0415 - Triton reads the environment

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of sums that overflow
        found = remembered(root, decode) if kept else decoded(root, decode, wanted)
    return {name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in found.items()}


def passes() -> bool:
    """Whether the kernel passes the test that decoders must pass before they are used."""
    from tallstore.loading.decode_triton import decode  # noqa: PLC0415 - as above

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return computes_exactly(decode, torch.device("cpu"))


def compile_all(root: Path) -> dict[str, str]:
    """The assembly that the kernel becomes for two forms of each kind of task "t", on a GPU of capability 9.0."""
    import triton  # noqa: PLC0415 - as above
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    from tallstore.loading import decode_triton  # noqa: PLC0415

    names = {
        torch.uint8: "*u8",
        torch.int8: "*i8",
        torch.int16: "*i16",
        torch.int32: "*i32",
        torch.int64: "*i64",
        torch.float16: "*fp16",
        torch.float32: "*fp32",
    }
    assembly: dict[str, str] = {}

    def compile_one(packed: Packed) -> None:
        by_row = any(packed.runs.values())
        if f"{packed.form.kind} {by_row}" in assembly:
            return
        regions, constants = decode_triton.arguments(packed)
        kernel = decode_triton._decode
        signature = dict(zip(kernel.arg_names, [names[region.dtype] for region in regions], strict=False))
        signature |= dict.fromkeys(constants, "constexpr")
        divisible = {(place,): [["tt.divisibility", 16]] for place in range(len(regions))}
        source = triton.compiler.ASTSource(kernel, signature, constants | {"ALIGNED": True}, divisible)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(decode_triton.OPTIONS))
        assembly[f"{packed.form.kind} {by_row}"] = compiled.asm["ptx"]

    decoded(root, compile_one)
    return assembly
