"""Which function answers which request."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import unquote

from tests.hub.loopback.wire import Answer, Request

if TYPE_CHECKING:
    from tests.hub.loopback.hub import LoopbackHub

Endpoint = Callable[..., Answer]
_PARTS = {"repo_id": "[^/]+/[^/]+", "path": ".+"}  # any other part of a path is one segment


class Routes:
    """Functions by the requests that they answer; a decorator for them."""

    def __init__(self) -> None:
        self._routes: list[tuple[str, re.Pattern[str], Endpoint]] = []

    def __call__(self, methods: str, template: str) -> Callable[[Endpoint], Endpoint]:
        """Let a function answer requests; each {name} in the template is an argument of it, unquoted."""
        pattern = re.sub(r"\{(\w+)\}", lambda name: f"(?P<{name[1]}>{_PARTS.get(name[1], '[^/]+')})", template)

        def register(endpoint: Endpoint) -> Endpoint:
            self._routes.extend((method, re.compile(pattern), endpoint) for method in methods.split())
            return endpoint

        return register

    def answer(self, hub: LoopbackHub, request: Request) -> Answer | None:
        """What the function says, None where there is none for this request."""
        for method, pattern, endpoint in self._routes:
            if method == request.method and (match := pattern.fullmatch(request.path)):
                return endpoint(hub, request, **{name: unquote(value) for name, value in match.groupdict().items()})
        return None
