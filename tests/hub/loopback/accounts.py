"""Who asks, and what they may do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from tests.hub.loopback.wire import RefusalError, Request

Role = Literal["read", "write"]


@dataclass(frozen=True)
class Account:
    """A token and its user. A user with two tokens is two accounts of one name.

    Attributes:
        role: what the token is good for, whatever its user may do.
        organisations: what the user may do in each.
    """

    token: str
    user: str
    role: Role = "write"
    organisations: Mapping[str, Role] = field(default_factory=lambda: MappingProxyType({}))

    def may_read_private(self, namespace: str) -> bool:
        return namespace == self.user or namespace in self.organisations

    def may_write(self, namespace: str) -> bool:
        owns = namespace == self.user or self.organisations.get(namespace) == "write"
        return owns and self.role == "write"


def whose(request: Request, accounts: Iterable[Account]) -> Account | None:
    """The account whose token the request carries, None where it carries none.

    A token that is no account's is refused even for what everyone may see, as on the Hub.
    """
    header = request.headers.get("authorization")
    if header is None:
        return None
    for account in accounts:
        if header == f"Bearer {account.token}":
            return account
    raise RefusalError(401, "Invalid credentials in Authorization header")


def signed_in(account: Account | None) -> Account:
    """Refuse strangers."""
    if account is None:
        raise RefusalError(401, "Invalid username or password.")
    return account
