"""A part's writer in a thread of its own, so that storing rows hides behind the engine that makes them."""

from __future__ import annotations

import threading
from collections import deque

from ..records import CapturedRow, Reject
from .writer import BadRow, PartWriter

QUEUE_BYTES = 256 << 20  # states that may wait; `add` blocks beyond, so that memory is bounded whatever the unit's size


class BackgroundPart:
    """Context manager around a PartWriter: `add` returns at once, rows are checked and written in their order by a thread.

    What the thread raises comes out of the next `add`, or of `finish`. A row that cannot be stored becomes one of the part's
    rejects. Leaving without `finish` and the part's `seal` publishes nothing.
    """

    def __init__(self, part: PartWriter, queue_bytes: int = QUEUE_BYTES):
        self.part = part
        self._limit = queue_bytes
        self._rows: deque[CapturedRow | None] = deque()  # None: no more will come
        self._bytes = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._rejects: list[Reject] = []
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)

    def __enter__(self) -> BackgroundPart:
        self.part.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._rows.clear()
        self._end()
        self.part.__exit__(*error)

    def add(self, captured: CapturedRow) -> None:
        """Hand a row over; blocks while too many bytes wait."""
        size = _bytes_of(captured)
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._rows or self._bytes + size <= self._limit)
            self._raise()
            self._rows.append(captured)
            self._bytes += size
            self._changed.notify_all()

    def finish(self) -> list[Reject]:
        """Wait until all rows are written, and return those that could not be; the part may be sealed then."""
        self._end()
        self._raise()
        return self._rejects

    def _end(self) -> None:
        with self._changed:
            self._rows.append(None)
            self._changed.notify_all()
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (captured := self._next()) is not None:
            try:
                self._write(captured)
            except BaseException as error:  # noqa: BLE001  raised again by the caller's next call
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return

    def _write(self, captured: CapturedRow) -> None:
        try:
            self.part.add(captured)
        except BadRow as error:
            reject = Reject(str(error), id=captured.row.id, retry=True)
            self.part.reject(reject)
            self._rejects.append(reject)

    def _next(self) -> CapturedRow | None:
        with self._changed:
            self._changed.wait_for(lambda: self._rows)
            captured = self._rows.popleft()
            if captured is not None:
                self._bytes -= _bytes_of(captured)
            self._changed.notify_all()
        return captured


def _bytes_of(captured: CapturedRow) -> int:
    return captured.aux.nbytes + (captured.last.nbytes if captured.last is not None else 0)
