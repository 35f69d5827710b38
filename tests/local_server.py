"""A server on this machine that drops, ignores, refuses and lies on request, and files that it holds."""

import contextlib
import hashlib
import http.server
import threading
import time
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from biopsy.data.datasets.base import RemoteFile, Source
from biopsy.data.download import RetryPolicy, fetch_source

BODY = np.random.default_rng(0).bytes(3_000_000)
QUICK = RetryPolicy(tries=3, backoff_s=0.0, timeout_s=5.0)
Disk = namedtuple("Disk", "total used free")


@dataclass
class Behaviour:
    """What the server holds and how it misbehaves; ``asked`` are the Range headers of every request."""

    bodies: dict[str, bytes] = field(default_factory=lambda: {"/data.bin": BODY})
    ranges: bool = True
    drop_after: list[int] = field(default_factory=list)  # one number of bytes per connection to cut
    answers: list[int] = field(default_factory=list)  # statuses to answer with before behaving
    wrong_range: bool = False
    pause_s: float = 0.0
    lengths: bool = True
    asked: list[str | None] = field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    behaviour: Behaviour

    def do_GET(self) -> None:
        does = self.behaviour
        wanted = self.headers.get("Range")
        does.asked.append(wanted)
        body = does.bodies.get(self.path.partition("?")[0])
        if does.answers or body is None:
            self.send_error(does.answers.pop(0) if does.answers else 404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and does.ranges else 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.end_headers()
            return
        self.send_response(206 if wanted and does.ranges else 200)
        if wanted and does.ranges:
            first = start + 7 if does.wrong_range else start
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if does.lengths:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self._send(body[start:])

    def _send(self, rest: bytes) -> None:
        does = self.behaviour
        rest = rest[: does.drop_after.pop(0)] if does.drop_after else rest
        step = len(rest) // 5 + 1 if does.pause_s else len(rest) + 1
        with contextlib.suppress(ConnectionError):  # the client may leave first
            for at in range(0, len(rest), step):
                self.wfile.write(rest[at : at + step])
                self.wfile.flush()
                time.sleep(does.pause_s)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on the loopback address; gives its base address and its behaviour."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    behaviour = Behaviour()
    handler = type("BoundHandler", (Handler,), {"behaviour": behaviour})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}", behaviour
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def data_file(base: str, **changes: object) -> RemoteFile:
    return RemoteFile(
        **{"url": f"{base}/data.bin", "size_bytes": len(BODY), "checksum": sha256(BODY), **changes}
    )


def get(file: RemoteFile, out: Path, **options: object):
    source = Source("test", "a test", "none", "none", files=(file,))
    return fetch_source(source, out, **{"retry": QUICK, **options})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
