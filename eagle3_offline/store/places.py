"""Where a dump lies: a local folder, or a prefix of S3-compatible object storage (s3://bucket/prefix, credentials from AWS_*).

Only what a dump needs: files that are written once, read whole or in ranges, and listed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..records import UserError
from ..runs import atomic_path, fsync_path

REMOTE = "s3://"


class File(Protocol):
    """A file opened for reading ranges; closed with its last reference."""

    size: int
    slow_requests: bool  # whether one large read is better than several small ones

    def read_range(self, offset: int, size: int) -> bytes | memoryview: ...

    def read_into(self, offset: int, out: np.ndarray) -> int:
        """Fill out [n] uint8 from there on; the number of bytes that there were."""

    def will_need(self, offset: int, size: int) -> None:
        """A range that will be read soon: where it can be fetched meanwhile, it is."""


class Place(Protocol):
    """A file or folder of a dump. Missing files raise FileNotFoundError, all other failures OSError."""

    @property
    def name(self) -> str: ...

    @property
    def parent(self) -> Place: ...

    def __truediv__(self, name: str) -> Place: ...

    def read(self) -> bytes: ...

    def open(self) -> File: ...

    def size(self) -> int | None:
        """Bytes of a file; None where there is none."""

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below, by its path from here."""

    def folders(self) -> list[str]:
        """Names of the folders here, ascending."""

    def write(self, data: bytes) -> None:
        """Write or replace a file, at once for every reader."""

    def remove(self) -> None:
        """Remove a file, or a folder with all that it holds."""


def place(where: Place | Path | str) -> Place:
    """The place that a path or an s3:// address names."""
    if isinstance(where, LocalPlace | ObjectPlace):
        return where
    if isinstance(where, str) and "://" in where:
        if not where.startswith(REMOTE):
            raise UserError(f"{where}: a dump lies in a local folder or under {REMOTE}BUCKET/PREFIX")
        return ObjectPlace(where.rstrip("/"))
    return LocalPlace(Path(where))


def is_remote(where: Path | str) -> bool:
    return str(where).startswith(REMOTE)


# ---------------------------------------------------------------------------------------------------------------------
# Local folders


@dataclass(frozen=True, slots=True)
class LocalPlace:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> LocalPlace:
        return LocalPlace(self.path.parent)

    def __truediv__(self, name: str) -> LocalPlace:
        return LocalPlace(self.path / name)

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        return self.path.read_bytes()

    def open(self) -> LocalFile:
        return LocalFile(self.path)

    def size(self) -> int | None:
        try:
            return self.path.stat().st_size if self.path.is_file() else None
        except FileNotFoundError:
            return None

    def sizes(self) -> dict[str, int]:
        found = {}
        for folder, _, names in os.walk(self.path):  # unlike rglob it bears folders that vanish meanwhile
            for file in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):
                    found[file.relative_to(self.path).as_posix()] = file.stat().st_size
        return found

    def folders(self) -> list[str]:
        return sorted(entry.name for entry in self.path.iterdir() if entry.is_dir()) if self.path.is_dir() else []

    def write(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(data)

    def remove(self) -> None:
        """A folder vanishes at once: it is renamed first, so that a kill leaves no half of it."""
        if not self.path.is_dir():
            return self.path.unlink(missing_ok=True)
        doomed = self.path.with_name(f".{self.path.name}.{os.getpid()}.removed")
        os.rename(self.path, doomed)
        fsync_path(self.path.parent)
        shutil.rmtree(doomed)


class LocalFile:
    """A descriptor for reads at given offsets, shared by threads and by forked processes."""

    slow_requests = False

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read_range(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def read_into(self, offset: int, out: np.ndarray) -> int:
        return os.preadv(self._descriptor, [out], offset)

    def will_need(self, offset: int, size: int) -> None:
        os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)


# ---------------------------------------------------------------------------------------------------------------------
# Object storage


@dataclass(frozen=True, slots=True)
class ObjectPlace:
    url: str

    @property
    def _bucket(self) -> str:
        return self.url.removeprefix(REMOTE).partition("/")[0]

    @property
    def _key(self) -> str:
        return self.url.removeprefix(REMOTE).partition("/")[2]

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPlace:
        return ObjectPlace(self.url.rpartition("/")[0])

    def __truediv__(self, name: str) -> ObjectPlace:
        return ObjectPlace(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def read(self) -> bytes:
        return self._call(lambda api, store: bytes(api.get(store, self._key).bytes()))

    def open(self) -> ObjectFile:
        size = self.size()
        if size is None:
            raise FileNotFoundError(errno.ENOENT, "No such object", self.url)
        return ObjectFile(self, size)

    def read_range(self, offset: int, size: int) -> memoryview:
        return self._call(lambda api, store: memoryview(api.get_range(store, self._key, start=offset, length=size)))

    def size(self) -> int | None:
        try:
            return self._call(lambda api, store: api.head(store, self._key)["size"])
        except FileNotFoundError:
            return None

    def sizes(self) -> dict[str, int]:
        prefix = f"{self._key}/"
        listed = self._call(lambda api, store: [entry for page in api.list(store, prefix=prefix) for entry in page])
        return {entry["path"].removeprefix(prefix): entry["size"] for entry in listed}

    def folders(self) -> list[str]:
        prefix = f"{self._key}/"
        found = self._call(lambda api, store: api.list_with_delimiter(store, prefix=prefix)["common_prefixes"])
        return sorted(name.removeprefix(prefix).rstrip("/") for name in found)

    def write(self, data: bytes) -> None:
        self._call(lambda api, store: api.put(store, self._key, data))

    def create(self, data: bytes) -> None:
        """Write a new object; FileExistsError where there is one (the server decides: if-none-match)."""
        self._call(lambda api, store: api.put(store, self._key, data, mode="create", use_multipart=False))

    def upload(self, file: Path) -> None:
        """Write an object from a local file, in pieces."""
        self._call(lambda api, store: api.put(store, self._key, file))

    def remove(self) -> None:
        keys = [f"{self._key}/{name}" for name in self.sizes()] or [self._key]
        self._call(lambda api, store: api.delete(store, keys))

    def _call(self, work: Callable[[Any, Any], Any]) -> Any:
        """Run a request, with the client's failures turned into OSErrors that name the object."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError

        try:
            return work(obstore, _client(self._bucket, os.getpid()))
        except (FileNotFoundError, NotFoundError):
            raise FileNotFoundError(errno.ENOENT, "No such object", self.url) from None
        except AlreadyExistsError:
            raise FileExistsError(errno.EEXIST, "The object exists", self.url) from None
        except BaseError as error:
            text = f"{error}".split("\n")[0].strip()
            raise OSError(
                errno.EIO, f"Object storage cannot be reached or refuses; check AWS_ENDPOINT and AWS_* ({text})", self.url
            ) from None


class ObjectFile:
    slow_requests = True

    def __init__(self, where: ObjectPlace, size: int):
        self._where = where
        self.size = size

    def read_range(self, offset: int, size: int) -> memoryview:
        return self._where.read_range(offset, size)

    def read_into(self, offset: int, out: np.ndarray) -> int:
        data = np.frombuffer(self.read_range(offset, len(out)), np.uint8)
        out[: len(data)] = data
        return len(data)

    def will_need(self, offset: int, size: int) -> None:
        pass


_CLIENT_PROCESS: list[int] = []  # the process that first used object storage


@lru_cache(None)
def _client(bucket: str, process: int) -> Any:
    """One client a bucket. The library's threads do not live on in a forked child, where a request would wait for ever."""
    from obstore.store import S3Store

    _CLIENT_PROCESS.append(process)
    if _CLIENT_PROCESS[0] != process:
        raise UserError("object storage was used before this process was forked; start workers with `spawn` or `forkserver`")
    return S3Store(bucket)
