"""What was asked of the Hub, to be counted."""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload
from urllib.parse import urlencode

from tests.hub.loopback.wire import Request


@dataclass
class Exchange:
    """One request and its answer.

    Attributes:
        server: "hub" or "storage".
        path: unquoted.
        byte_range: the Range header.
        authorised: whether it carried a token, valid or not.
        received_nbytes: of the request's body.
        status: None where the connection was dropped before an answer, or no answer was sent yet.
        sent_nbytes: of the answer's body, handed to the connection.
    """

    server: str
    method: str
    path: str
    query: str
    byte_range: str | None
    authorised: bool
    received_nbytes: int
    status: int | None = None
    sent_nbytes: int = 0

    @classmethod
    def of(cls, request: Request) -> Exchange:
        return cls(
            request.server,
            request.method,
            request.plain_path,
            urlencode(request.query, doseq=True),
            request.headers.get("range"),
            "authorization" in request.headers,
            len(request.body),
        )


class RequestLog(Sequence[Exchange]):
    """The exchanges, in the order in which requests arrived whole."""

    def __init__(self) -> None:
        self._exchanges: list[Exchange] = []
        self._lock = threading.Lock()

    def append(self, exchange: Exchange) -> None:
        with self._lock:
            self._exchanges.append(exchange)

    def select(self, method: str | None = None, path: str = "*", server: str | None = None) -> list[Exchange]:
        """Those of a *method* and a *server* whose path matches a glob; `*` matches slashes too."""
        return [
            exchange
            for exchange in list(self._exchanges)
            if method in {None, exchange.method}
            and server in {None, exchange.server}
            and fnmatch.fnmatchcase(exchange.path, path)
        ]

    def clear(self) -> None:
        with self._lock:
            self._exchanges.clear()

    @overload
    def __getitem__(self, index: int) -> Exchange: ...
    @overload
    def __getitem__(self, index: slice) -> list[Exchange]: ...
    def __getitem__(self, index: int | slice) -> Exchange | list[Exchange]:
        return self._exchanges[index]

    def __len__(self) -> int:
        return len(self._exchanges)
