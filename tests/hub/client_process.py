"""Processes in which the Hub's client runs: it reads its settings when it is imported, so they must be there before."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FOREIGN = ("HF_", "HUGGING", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "TRANSFORMERS_")


def client_environment(
    url: str, home: Path, *, token: str | None = None, xet: bool = False, **settings: str
) -> dict[str, str]:
    """This process's environment with a client's settings: that Hub and no other, its cache below *home*.

    For commands that are run as a subprocess; *settings* are more variables.
    """
    ours = {name: value for name, value in os.environ.items() if not name.upper().startswith(_FOREIGN)}
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    client = {"HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), **quiet}
    if token is not None:
        client["HF_TOKEN"] = token
    if not xet:
        client["HF_HUB_DISABLE_XET"] = "1"
    return {**ours, **client, **settings}


@contextlib.contextmanager
def client_process(
    url: str,
    home: Path,
    *,
    token: str | None = None,
    xet: bool = False,
    impatient: bool = True,
    processes: int = 1,
    **settings: str,
) -> Iterator[ProcessPoolExecutor]:
    """A process with a client's settings, which stays until the context ends: `process.submit(function, …).result()`.

    Args:
        impatient: whether the client waits next to nothing before it tries again.
        processes: how many; tests that race want several.
        settings: more variables of its environment.
    """
    environment = client_environment(url, home, token=token, xet=xet, **settings)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin, (environment, impatient)) as process:
        yield process


def _begin(environment: dict[str, str], impatient: bool) -> None:
    os.environ.clear()
    os.environ.update(environment)
    if impatient:
        _wait_less()


def _wait_less() -> None:
    import time  # noqa: PLC0415

    from huggingface_hub import file_download  # noqa: PLC0415 - it reads the environment
    from huggingface_hub.utils import _http  # noqa: PLC0415

    hurried = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.001))})
    _http.time = file_download.time = hurried
