"""What the viewer and the service share: requests refused, answers without tracebacks, the server."""

import asyncio
import hmac
import ipaddress
import logging
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from biopsy.core.errors import BiopsyError, DataError, RunError

logger = logging.getLogger(__name__)

MAX_BODY = 2**20  # bytes of a request, by default
BODY_S = 60.0  # seconds in which a small request must have arrived
HEADERS_S = 15.0  # seconds in which the headers of a request must have arrived
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}

Headers = dict[str, str]


class TooLarge(HTTPException):
    """A request's body is larger than is read."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"the request is larger than {limit:,} bytes")


class Guard:
    """Refuses requests by another site's page, without the token, too large or too slow; answers HEAD as GET.

    Args:
        hosts: Names under which the server is reached; None for any. A page of another site could otherwise
            reach a server on this machine by a name that it makes resolve to it (DNS rebinding).
        token: That requests must bear; None for none.
        open_paths: Paths that need no token.
        limit: Returns the bytes allowed in a request to a path, and the seconds in which they must arrive.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: frozenset[str] | None = None,
        token: str | None = None,
        open_paths: frozenset[str] = frozenset(),
        limit: Callable[[str], tuple[int, float]] = lambda path: (MAX_BODY, BODY_S),
    ) -> None:
        self.app, self.hosts, self.token, self.open_paths, self.limit = app, hosts, token, open_paths, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        most, seconds = self.limit(scope["path"])
        refusal = self._refuse(scope["path"], headers, most)
        if refusal is not None:
            return await refusal(scope, receive, send)
        started, is_head = False, scope["method"] == "HEAD"
        if is_head:
            scope = {**scope, "method": "GET"}

        async def send_on(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                names = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in names),
                ]
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        try:
            await self.app(scope, _limited(receive, most, seconds), send_on)
        except TooLarge as error:
            if not started:
                await answer(error.status_code, error.detail)(scope, receive, send)
        except TimeoutError:
            if not started:
                await answer(408, f"the request did not arrive within {seconds:g} s")(scope, receive, send)

    def _refuse(self, path: str, headers: Headers, most: int) -> JSONResponse | None:
        host = headers.get("host", "")
        if self.hosts is not None and _host_name(host) not in self.hosts:
            return answer(421, f"this server is not called {host!r}")
        origin = headers.get("origin")  # "null" of a page without one
        if origin is not None and urlsplit(origin).netloc != host:
            return answer(403, "requests of other sites' pages are refused")
        if self.token is not None and path not in self.open_paths:
            scheme, _, sent_token = headers.get("authorization", "").strip().partition(" ")
            is_right = hmac.compare_digest(sent_token.strip().encode(), self.token.encode())
            if scheme.lower() != "bearer" or not is_right:
                refusal = answer(401, "a token is needed: send the header Authorization: Bearer TOKEN")
                refusal.headers["www-authenticate"] = "Bearer"
                return refusal
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            return answer(413, f"the request is larger than {most:,} bytes")
        return None


def _host_name(host: str) -> str:
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]


def _limited(receive: Receive, most: int, seconds: float) -> Receive:
    """Return a ``receive`` that refuses more bytes, or a later end, than is allowed."""
    n_bytes, deadline, complete = 0, asyncio.get_running_loop().time() + seconds, False

    async def read() -> Message:
        nonlocal n_bytes, complete
        if complete:
            return await receive()
        async with asyncio.timeout_at(deadline):
            message = await receive()
        n_bytes += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if n_bytes > most:
            raise TooLarge(most)
        return message

    return read


def answer(status: int, message: str, **headers: str) -> JSONResponse:
    """Return an error as every error is returned: ``{"error": message}``."""
    return JSONResponse({"error": message}, status, headers or None)


def name_errors(app: FastAPI) -> None:
    """Answer every error with one line of JSON: errors of this package with their message, others without."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        status = 409 if isinstance(error, RunError) else 422 if isinstance(error, DataError) else 400
        return answer(status, str(error))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return answer(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    async def missing(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, OSError)
        return answer(404, f"a file cannot be read: {error.strerror or 'unknown reason'}")

    app.add_exception_handler(BiopsyError, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(OSError, missing)
    app.add_exception_handler(Exception, _internal)


async def _internal(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s failed: %s: %s", request.method, request.url.path, type(error).__name__, error)
    return answer(500, "internal error; the server's log names it")


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int | None, *, default: int) -> socket.socket:
    """Return a listening socket on a port; without one, on the first free one from ``default``.

    Raises:
        DataError: If the port is taken or none, or the address is not this machine's.
    """
    if port is not None and not 0 <= port < 2**16:
        raise DataError(f"port={port}: expected 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in [port] if port is not None else [*range(default, default + 20), 0]:
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(512)
        except OSError as error:
            listener.close()
            if port is not None:
                raise DataError(
                    f"cannot listen on {host}:{port}: {error.strerror}; name another --port"
                ) from None
            reason = error.strerror
            continue
        return listener
    raise DataError(f"cannot listen on {host}: {reason}")


class _Protocol(H11Protocol):
    """Closes connections on which the headers of a request do not arrive in `HEADERS_S` seconds."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADERS_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def run_server(app: FastAPI, listener: socket.socket, *, on_start: Callable[[], None]) -> None:
    """Serve until Ctrl-C.

    Args:
        listener: As `bind` returns it; the caller closes it.
        on_start: Called once requests are answered.
    """
    config = uvicorn.Config(
        app,
        lifespan="off",  # below: here its errors would be printed with a traceback
        http=_Protocol,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=10,
        server_header=False,
    )
    server = uvicorn.Server(config)

    async def serve() -> None:
        async with app.router.lifespan_context(app):
            task = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started and not task.done():
                await asyncio.sleep(0.02)
            if server.started:
                on_start()
            await task

    try:
        asyncio.run(serve())
    except KeyboardInterrupt:
        pass
