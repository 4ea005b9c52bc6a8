"""A Hugging Face Hub on 127.0.0.1 that the real client talks to: what it asks for when it pushes and pulls models.

    with LoopbackHub() as hub:
        hub.add("user/model", {"a" * 40: {"config.json": b"{}"}})
        api = HfApi(endpoint=hub.url, token=hub.token)

`hub.py` is the server, `log.py` what was asked of it, `faults.py` what goes wrong on purpose. Below them, `routes.py`
sends requests to `repositories.py` (create, list, read), `commits.py` (what a push decides) and `transfers.py` (the
bytes) or `cas.py` (the same by Xet); `repository.py`, `storage.py` and `xet.py` keep what they are sent.
"""

from tests.hub.loopback.accounts import Account
from tests.hub.loopback.hub import LoopbackHub

__all__ = ["Account", "LoopbackHub"]
