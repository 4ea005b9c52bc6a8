"""The server: repositories, accounts, and the ports behind which they are."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Mapping, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

from tests.hub.loopback import cas, commits, repositories, transfers
from tests.hub.loopback.accounts import Account, signed_in, whose
from tests.hub.loopback.faults import Fault, Faults
from tests.hub.loopback.log import Exchange, RequestLog
from tests.hub.loopback.repository import Contents, Repository
from tests.hub.loopback.storage import Storage
from tests.hub.loopback.wire import Answer, Handler, RefusalError, Request

DEFAULT_ACCOUNT = Account("hf_loopback", "user")
_ROUTES = (repositories.routes, commits.routes, transfers.routes, cas.routes)


class LoopbackHub:
    """A Hub while the context is open.

    Args:
        accounts: who may sign in; the first is the one whose token is `token`.
        xet: whether large files may travel by Xet.
        cdn: whether large files lie on another server, to which the Hub redirects.
        multipart: the size of the parts in which larger files are sent, None to take all whole.
        page: how many entries of a list are answered at once.
        root: where contents are kept, by default a temporary directory.

    Attributes:
        url: what `HF_ENDPOINT` must be.
        storage_url: where large files are sent to and read from.
        repositories: by id.
        log: every request that arrived.
        crashes: what the server itself did wrong; closing raises the first.
    """

    def __init__(
        self,
        *,
        accounts: Sequence[Account] = (DEFAULT_ACCOUNT,),
        xet: bool = False,
        cdn: bool = False,
        multipart: int | None = None,
        page: int = 1000,
        root: Path | None = None,
    ) -> None:
        self._closing = contextlib.ExitStack()
        if root is None:
            root = Path(self._closing.enter_context(tempfile.TemporaryDirectory(prefix="loopback-hub-")))
        self.accounts, self.multipart, self.page = accounts, multipart, page
        self.storage = Storage(root, xet=xet)
        self.repositories: dict[str, Repository] = {}
        self.lock = threading.Lock()  # of `repositories`
        self.log = RequestLog()
        self.crashes: list[Exception] = []
        self.faults = Faults()
        names = ["hub", *(["storage"] if cdn else []), *(["inner"] if xet else [])]
        self._servers = {name: _Server(self, name) for name in names}
        self.has_cdn = cdn
        self.url = self.url_of("hub")
        self.storage_url = self.url_of("storage") if cdn else self.url
        if xet:
            self.storage.xet_url = f"{self.url_of('inner')}/cas"

    @property
    def token(self) -> str:
        return self.accounts[0].token

    def add(
        self,
        repo_id: str,
        history: Mapping[str, Contents] | None = None,
        *,
        refs: Mapping[str, str] | None = None,
        private: bool = False,
        gated: bool = False,
    ) -> Repository:
        """Make a repository, while the context is open.

        Args:
            history: sha -> all files of that commit, the oldest first; by default the one that a new repository has.
            refs: full names -> sha, beside main, which is the last commit.
        """
        repository = Repository(repo_id, self.storage, private=private, gated=gated)
        if history is None:
            repository.begin()
        before: set[str] = set()
        for sha, contents in (history or {}).items():
            repository.push(contents, delete=before - set(contents), title=f"Commit {sha}", sha=sha)
            before = set(contents)
        repository.refs |= refs or {}
        self.repositories[repo_id] = repository
        return repository

    def inject(
        self, fault: Fault, method: str | None = None, path: str = "*", *, skip: int = 0, times: int | None = 1
    ) -> None:
        """Let something go wrong.

        Args:
            method, path: which requests are meant; the path is a glob on the unquoted one, and `*` matches slashes.
            skip: how many of them pass before.
            times: how many of them are hit, None for all.
        """
        self.faults.inject(fault, method, path, skip=skip, times=times)

    def url_of(self, server: str) -> str:
        # Not only another port: older clients compare hosts before they follow a redirect or take a token along.
        host = "localhost" if server == "storage" else "127.0.0.1"
        return f"http://{host}:{self._servers[server].server_port}"

    def begin(self, request: Request) -> tuple[Exchange, Fault]:
        """The request's place in the log, and what is to go wrong with it."""
        exchange = Exchange.of(request)
        if request.server == "inner":
            return exchange, Fault()
        self.log.append(exchange)
        return exchange, self.faults.take(request)

    def answer(self, request: Request) -> Answer:
        for routes in _ROUTES:
            if answer := routes.answer(self, request):
                return answer
        raise RefusalError(404, f"Sorry, we can't find the page you are looking for: {request.method} {request.path}")

    def account(self, request: Request) -> Account | None:
        """Who asks, None for a stranger."""
        return whose(request, self.accounts)

    def readable(self, request: Request, repo_id: str) -> Repository:
        """A repository for someone who may see it; whether others exist, nobody is told."""
        account = self.account(request)
        repository = self.repositories.get(repo_id)
        if repository is None or not repository.is_visible_to(account):
            if account is None:
                raise RefusalError(401, "Invalid username or password.", "RepoNotFound")
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, request: Request, repo_id: str) -> Repository:
        """A repository for someone who may change it."""
        repository = self.readable(request, repo_id)
        if not signed_in(self.account(request)).may_write(repository.namespace):
            raise RefusalError(403, "Forbidden: pass a token with write access to this repository")
        return repository

    def __enter__(self) -> LoopbackHub:
        for server in self._servers.values():
            server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.faults.release()
        for server in self._servers.values():
            server.stop()
        self._closing.close()
        if self.crashes and error is None:
            raise self.crashes[0]


class _Server(ThreadingHTTPServer):
    """A port, and a thread for each connection to it; all of them end when it stops."""

    daemon_threads = False  # closing waits for the threads of connections
    request_queue_size = 64

    def __init__(self, hub: LoopbackHub, name: str) -> None:
        super().__init__(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub, "server_name": name}))
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # closed by the client meanwhile
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self._connections.add(request)
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self._connections.discard(request)
        super().shutdown_request(request)
