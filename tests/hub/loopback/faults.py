"""What goes wrong on purpose.

hub.inject(Status(503), "GET", "/user/model/resolve/*", times=2)
"""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Callable
from dataclasses import dataclass

from tests.hub.loopback.wire import Answer, DropError, RefusalError, Request


class Fault:
    """What happens to a request that it is injected for: nothing, unless a subclass says more."""

    def __repr__(self) -> str:
        return type(self).__name__  # the name of a test, the same in every process

    def before(self, request: Request) -> None:
        """Act before the request is carried out; may raise RefusalError or DropError instead of it."""

    def after(self, answer: Answer) -> Answer:
        """Act on the answer, when the request has been carried out; may raise DropError."""
        return answer

    def release(self) -> None:
        """Let go whoever waits: the server stops."""


@dataclass
class Status(Fault):
    """An error status, and nothing is carried out."""

    status: int
    retry_after: int | None = None
    message: str = "injected"

    def before(self, request: Request) -> None:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        raise RefusalError(self.status, self.message, **headers)


class Drop(Fault):
    """The connection closes before anything is carried out."""

    def before(self, request: Request) -> None:
        raise DropError


class LoseAnswer(Fault):
    """The request is carried out, then the connection closes without an answer."""

    def after(self, answer: Answer) -> Answer:
        raise DropError


@dataclass
class Truncate(Fault):
    """The connection closes after so many bytes of the body, of which Content-Length promised all."""

    nbytes: int

    def after(self, answer: Answer) -> Answer:
        answer.sent_nbytes = self.nbytes
        return answer


@dataclass
class Tamper(Fault):
    """One byte of the body is another."""

    at: int = 0

    def after(self, answer: Answer) -> Answer:
        body = bytearray(answer.body)
        body[self.at] ^= 0xFF
        answer.body = bytes(body)
        return answer


class Hold(Fault):
    """The request waits before it is carried out, until it is let go.

    Attributes:
        reached: set when a request waits.
        released: set it to let go.
    """

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.released = threading.Event()

    def before(self, request: Request) -> None:
        self.reached.set()
        self.released.wait()

    def release(self) -> None:
        self.released.set()


class Delay(Fault):
    """The request waits some seconds before it is carried out."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._released = threading.Event()

    def before(self, request: Request) -> None:
        self._released.wait(self._seconds)

    def release(self) -> None:
        self._released.set()


@dataclass
class Call(Fault):
    """Something else happens first: somebody commits, a file is deleted."""

    function: Callable[[], object]

    def before(self, request: Request) -> None:
        self.function()


@dataclass
class _Rule:
    fault: Fault
    method: str | None
    path: str
    skip: int
    times: int | None

    def takes(self, request: Request) -> bool:
        """Whether this request is one of those meant; counts it."""
        if self.method not in {None, request.method} or not fnmatch.fnmatchcase(request.plain_path, self.path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None:
            if not self.times:
                return False
            self.times -= 1
        return True


class Faults:
    """The rules, of which the first that takes a request decides."""

    def __init__(self) -> None:
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()

    def inject(self, fault: Fault, method: str | None, path: str, *, skip: int, times: int | None) -> None:
        with self._lock:
            self._rules.append(_Rule(fault, method, path, skip, times))

    def take(self, request: Request) -> Fault:
        with self._lock:
            return next((rule.fault for rule in self._rules if rule.takes(request)), Fault())

    def clear(self) -> None:
        self.release()
        with self._lock:
            self._rules.clear()

    def release(self) -> None:
        for rule in list(self._rules):
            rule.fault.release()
