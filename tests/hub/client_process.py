"""Processes in which the Hub's client runs: it reads its settings when it is imported, so they must be there before."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

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


class Client:
    """The methods of `HfApi`, called in a process on one Hub: `client("create_repo", "user/model")`.

    Attributes:
        home: a directory of its own; its cache is there.
    """

    def __init__(self, process: Executor, url: str, token: str | None, home: Path) -> None:
        self._process, self._url, self._token, self.home = process, url, token, home

    def __call__(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self.submit(method, *arguments, **options).result()

    def submit(self, method: str, *arguments: Any, **options: Any) -> Future[Any]:
        if method in {"hf_hub_download", "snapshot_download", "resolve_revision"}:
            options.setdefault("cache_dir", self.home / "cache")
        return self._process.submit(_call, self._url, self._token, method, arguments, options)

    def signed_in(self, token: str | None) -> Client:
        """The same process with another token, None for a stranger."""
        return Client(self._process, self._url, token, self.home)


def _call(url: str, token: str | None, method: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    import huggingface_hub  # noqa: PLC0415 - it reads the environment

    # False, not None: no token of the environment either.
    found = getattr(huggingface_hub.HfApi(url, token or False), method)(*arguments, **options)
    return list(found) if isinstance(found, types.GeneratorType) else found


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

    The function is one of a module, which is imported there after the settings are made. What this process was started
    with (`__main__`: pytest's) is imported before them.

    Args:
        impatient: whether the client waits next to nothing before it tries again.
        processes: how many; tests that race want several.
        settings: more variables of its environment.
    """
    if impatient:
        settings = {"HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms", **settings}
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
