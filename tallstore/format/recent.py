"""What was made last, kept by key: opened shards, parsed tables."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from tallstore import forking

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")


class Recent(Generic[Key, Item]):
    """What was made for a key, for the keys that were used last. Threads may share it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items = OrderedDict[Key, Item]()
        self._lock = forking.rlock()

    def get(self, key: Key, make: Callable[[], Item]) -> Item:
        """The item of *key*; made now if it is not here. Two threads never make one at the same time."""
        with self._lock:
            item = self._items[key] if key in self._items else make()
            self._items[key] = item
            self._items.move_to_end(key)
            if len(self._items) > self._limit:
                self._items.popitem(last=False)
            return item

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._items.clear()
