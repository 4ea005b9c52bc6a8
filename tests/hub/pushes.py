"""Pushes in a client's process: what became of each, and all that was said meanwhile."""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from huggingface_hub import constants

import tallstore
from tallstore.format import layout
from tallstore.format.parsing import parse_manifest, serialise_manifest
from tallstore.hub import repository
from tests.command_line import run
from tests.hub.listening import listening
from tests.hub.loopback import LoopbackHub

REPO = "user/experts"


@dataclass
class Outcome:
    """What a push returned or raised.

    Attributes:
        oid, message, pr_url: of the commit; oid is None where there is none.
        error, problem: the class and message of what was raised.
        progress: what was told.
        warnings: their texts.
        said: log records down to DEBUG, and the traceback.
    """

    oid: str | None = None
    message: str | None = None
    pr_url: str | None = None
    error: str | None = None
    problem: str = ""
    progress: list[tuple[int, int]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    said: str = ""


class Pusher:
    """`tallstore.push` in a *process*, to a Hub, with a token and *options*: `push(path, repo_id).oid`."""

    def __init__(self, process: Executor, url: str, token: str | None, **options: object) -> None:
        self._process, self._url, self._options = process, url, {"token": token, **options}

    def __call__(self, path: Path, repo_id: str, **options: object) -> Outcome:
        return self.start(path, repo_id, **options).result(timeout=120)

    def start(self, path: Path, repo_id: str, *, without: str | None = None, **options: object) -> Future[Outcome]:
        """A push under way; *without* is a package that is not installed there."""
        return self._process.submit(_push, self._url, path, repo_id, {**self._options, **options}, without)


class CommandLine:
    """`tallstore` in a *process*, with a Hub: what `tests.command_line.run` returns."""

    def __init__(self, process: Executor, url: str, token: str | None) -> None:
        self._process, self._url, self._token = process, url, token

    def __call__(self, *arguments: object, code: int = 0, **environment: str) -> tuple[str, str]:
        """Run a command; what it wrote to stdout and to stderr."""
        environment = {"HF_TOKEN": self._token or "", **environment}
        return self._process.submit(_run, self._url, arguments, code, environment).result(timeout=120)


def contents(path: Path) -> dict[str, bytes]:
    """The files of a bundle here by path."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def pushed(hub: LoopbackHub, revision: str = "main") -> dict[str, bytes]:
    """The bundle's files on the Hub."""
    return {
        path: content
        for path, content in hub.repositories[REPO].read(revision).items()
        if path == layout.MANIFEST or layout.is_bundle_path(path)
    }


def plots(hub: LoopbackHub, revision: str = "main") -> dict[str, bytes]:
    """The pictures of the card on the Hub, by path."""
    files = hub.repositories[REPO].read(revision)
    return {path: content for path, content in files.items() if path.startswith("plots/tallstore-")}


def titles(hub: LoopbackHub, revision: str = "main") -> list[str]:
    """Of the commits, the newest first."""
    return [commit.title for commit in hub.repositories[REPO].history(revision)]


def name_base(bundle: Path, repo_id: str) -> None:
    """Let a bundle's manifest name its base."""
    manifest = parse_manifest((bundle / "tallstore.json").read_bytes(), "tallstore.json")
    pin = msgspec.structs.replace(manifest.base, repo_id=repo_id)
    (bundle / "tallstore.json").write_bytes(serialise_manifest(msgspec.structs.replace(manifest, base=pin)))


def _run(url: str, arguments: Sequence[object], code: int, environment: dict[str, str]) -> tuple[str, str]:
    _connect(url)
    result = run(*arguments, code=code, **environment)
    return result.stdout, result.stderr


def _connect(url: str) -> None:
    """Let the client talk to a Hub that its environment does not name: one process serves many."""
    constants.ENDPOINT, constants.HUGGINGFACE_CO_URL_TEMPLATE = (
        url,
        f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    repository._WAITS = (0.001, 0.001)


@contextlib.contextmanager
def _lacking(package: str | None) -> Iterator[None]:
    """As if a package was not installed."""
    if package is None:
        yield
        return
    before = sys.modules.get(package, package)
    sys.modules[package] = None
    try:
        yield
    finally:
        if before is package:
            del sys.modules[package]
        else:
            sys.modules[package] = before


def _push(url: str, path: Path, repo_id: str, options: dict[str, object], without: str | None) -> Outcome:
    _connect(url)
    outcome = Outcome()
    with _lacking(without), listening() as records, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            made = tallstore.push(path, repo_id, progress=lambda *told: outcome.progress.append(told), **options)
            outcome.oid, outcome.message, outcome.pr_url = made.oid, made.commit_message, made.pr_url
        except tallstore.TallstoreError as error:
            outcome.error, outcome.problem = type(error).__name__, str(error)
            outcome.said = traceback.format_exc()
    outcome.warnings = [str(warning.message) for warning in warned]
    outcome.said += "\n".join(records)
    return outcome
