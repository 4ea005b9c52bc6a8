"""Work in processes of its own, so that what one leaves behind is no other's gain."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def apart(work: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever JSON holds
    """What *work* returns, from a forked process.

    The process that calls this is to compute nothing itself: OpenMP's threads, once begun, do not come along to a
    forked one.

    Raises:
        SystemExit: *work* failed; its traceback was printed.
    """
    sys.stdout.flush()
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.write(sender, json.dumps(work()).encode())
            status = 0
        except Exception:  # noqa: BLE001 - said here, and told by the status
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(sender)
    with open(receiver, "rb") as pipe:  # noqa: PTH123 - a descriptor
        raw = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("it failed")
    return json.loads(raw)
