"""A value that an object computes once, without a lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class lazy:  # noqa: N801  used as a decorator
    """Like functools.cached_property, which holds a lock in Python 3.11: a process forked while a thread held it would wait for ever.

    Two threads may compute a value twice; it has to be the same.
    """

    def __init__(self, compute: Callable[[Any], Any]):
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        value = instance.__dict__[self._name] = self._compute(instance)
        return value
