"""Requests and answers, as values, and the handler that reads the ones and writes the others."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from tests.hub.loopback.faults import Fault
    from tests.hub.loopback.hub import LoopbackHub
    from tests.hub.loopback.log import Exchange

_CHUNK_NBYTES = 1 << 16
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_request_ids = itertools.count(1)


@dataclass(frozen=True)
class Request:
    """What a client asks.

    Attributes:
        server: where it arrived: "hub", "storage", or "inner", which nobody but the Hub itself asks.
        path: still quoted, for a revision may hold a slash as %2F.
        query: every value of every name.
        headers: by name in lower case.
    """

    server: str
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    @property
    def plain_path(self) -> str:
        return unquote(self.path)

    def json(self) -> Any:
        return json.loads(self.body)

    def byte_range(self, nbytes: int) -> tuple[int, int] | None:
        """From where and up to where of so many bytes a part is asked for, None where all are."""
        wanted = _RANGE.fullmatch(self.headers.get("range", ""))
        if wanted is None:
            return None
        if wanted[1]:
            start, stop = int(wanted[1]), min(int(wanted[2] or nbytes) + 1, nbytes)
        else:
            start, stop = max(nbytes - int(wanted[2]), 0), nbytes
        if start >= stop:
            raise RefusalError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{nbytes}"})
        return start, stop

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in {"1", "true"}


@dataclass
class Answer:
    """What is answered. Of the body, no more than *sent_nbytes* are sent, whatever Content-Length says."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    sent_nbytes: int | None = None

    @classmethod
    def of_json(cls, value: object, status: int = 200, **headers: str) -> Answer:
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})

    @classmethod
    def of_content(cls, content: bytes, request: Request, headers: dict[str, str]) -> Answer:
        """A content, or the range of it that is asked for."""
        headers = {"Accept-Ranges": "bytes", **headers}
        wanted = request.byte_range(len(content))
        if wanted is None:
            return cls(content, headers=headers)
        start, stop = wanted
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return cls(content[start:stop], 206, headers)


class RefusalError(Exception):
    """An answer with an error status. The client tells errors apart by their code, where there is one."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        in_header = message.encode("latin-1", "replace").decode("latin-1")
        self.headers = {"X-Error-Message": in_header, **({"X-Error-Code": code} if code else {}), **headers}

    def answer(self) -> Answer:
        return Answer.of_json({"error": self.message}, self.status, **self.headers)


class DropError(Exception):
    """Closes the connection without an answer."""


class Handler(BaseHTTPRequestHandler):
    """One connection of a client; `LoopbackHub` makes a subclass for each of its servers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is written in pieces, and nobody should wait for an acknowledgement
    hub: LoopbackHub
    server_name: str

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name that the base class gives it
        """Keep quiet: `LoopbackHub.log` is the log."""

    def _answer(self) -> None:
        try:
            request = self._read()
            exchange, fault = self.hub.begin(request)
            self._send(fault.after(self._carry_out(request, fault)), exchange)
        except (DropError, ConnectionError):
            self.close_connection = True

    def _carry_out(self, request: Request, fault: Fault) -> Answer:
        try:
            fault.before(request)
            return self.hub.answer(request)
        except RefusalError as refusal:
            return refusal.answer()
        except DropError:
            raise
        except Exception as crash:  # noqa: BLE001 - whatever it is, a test should hear of it
            self.hub.crashes.append(crash)
            return RefusalError(500, f"The loopback Hub failed: {crash!r}").answer()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _read(self) -> Request:
        target = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = parse_qs(target.query, keep_blank_values=True)
        return Request(self.server_name, self.command, target.path, query, headers, self._read_body(headers))

    def _read_body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return self._read_exactly(int(headers.get("content-length", 0)))
        chunks = []
        while nbytes := int(self.rfile.readline().partition(b";")[0] or b"0", 16):
            chunks.append(self._read_exactly(nbytes))
            self.rfile.readline()
        self._read_exactly(len(b"\r\n"))
        return b"".join(chunks)

    def _read_exactly(self, nbytes: int) -> bytes:
        read = self.rfile.read(nbytes)
        if len(read) < nbytes:  # the client is gone
            raise DropError
        return read

    def _send(self, answer: Answer, exchange: Exchange) -> None:
        exchange.status = answer.status  # before it is sent: whoever has the answer finds it in the log
        self.send_response(answer.status)
        headers = {"X-Request-Id": f"loopback-{next(_request_ids)}", "Content-Length": str(len(answer.body))}
        for name, value in {**headers, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = memoryview(answer.body)[: answer.sent_nbytes]
        for start in range(0, len(body), _CHUNK_NBYTES):
            chunk = body[start : start + _CHUNK_NBYTES]
            exchange.sent_nbytes += len(chunk)
            self.wfile.write(chunk)
        if len(body) < len(answer.body):
            raise DropError
