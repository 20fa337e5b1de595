"""Guards of the HTTP server against requests that are too large, too slow, too many, or of pages of other sites."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmctr.serving.schemas import MAX_BODY, MAX_PICTURE

logger = logging.getLogger(__name__)

BUDGET = 30.0
"""seconds for one request, from the first byte of the body to the answer"""
HEADERS_WITHIN = 10.0
"""seconds within which the next request on an open connection must have come with all headers"""
DRAIN_BYTES, DRAIN_SECONDS = 256_000_000, 10.0
"""how much of a body that is too large is read and thrown away, so that the sender reads the answer"""
OTHERS = 48
"""file descriptors that are kept free for everything but connections"""


class HeadAsGet:
    """ASGI middleware that answers HEAD as GET; the server sends no body to HEAD. Monitors ask so whether it is up.

    Args:
        app: the application.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request of ASGI. The scope is copied: the server looks at the method in its own."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = scope | {"method": "GET"}
        await self.app(scope, receive, send)


class SameOrigin:
    """ASGI middleware that refuses requests that a browser sends for a page of another site.

    A form of another site can be sent here without asking first (no preflight), and would keep the server busy.
    Programs other than browsers send no `Origin`.

    Args:
        app: the application.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request of ASGI; a request of another site gets the status 403."""
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            origin, host = headers.get(b"origin"), headers.get(b"host", b"")
            cross = headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site") and scope["method"] != "GET"
            if cross or (origin is not None and urlsplit(origin.decode("latin-1")).netloc.encode("latin-1") != host):
                response = JSONResponse({"detail": "requests of pages of other sites are refused"}, 403)
                return await response(scope, receive, send)
        return await self.app(scope, receive, send)


class TimeBudget:
    """ASGI middleware that answers 503 when a request takes too long, and when a body stops to come.

    A computation that has begun goes on in its thread, but holds up nobody who waits for a connection.

    Args:
        app: the application.
        seconds: the budget.
    """

    def __init__(self, app: Any, seconds: float = BUDGET):
        self.app, self.seconds = app, seconds
        self._late: set[asyncio.Task[Any]] = set()
        """tasks whose request was answered 503; a task nobody refers to could be collected while it runs"""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request of ASGI."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = late = False

        async def noted(message: Any) -> None:
            nonlocal began
            if not late:
                began = True
                await send(message)

        # not wait_for, which would wait for the thread of an endpoint
        task = asyncio.ensure_future(self.app(scope, receive, noted))
        reason = f"took longer than {self.seconds:g} seconds; ask for less, or again later"
        try:
            done, _ = await asyncio.wait({task}, timeout=self.seconds)
        except asyncio.CancelledError:  # the server ends, and has waited for this request long enough
            done, reason = set(), "the server ends"
        if done:
            return task.result()
        late = not began
        self._late.add(task)
        task.add_done_callback(self._ended)
        task.cancel()  # ends a wait for the rest of a body
        if late:
            headers = {"Connection": "close", "Retry-After": "5"}
            await JSONResponse({"detail": reason}, 503, headers)(scope, receive, send)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._late.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.info("a request that was answered 503 ended with %r", task.exception())


class BodyLimit:
    """ASGI middleware that refuses bodies above the allowed size, by the declared length or while they are received.

    Args:
        app: the application.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request of ASGI; a body that is too large gets the status 413."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        upload = headers.get(b"content-type", b"").startswith(b"multipart/form-data")
        limit = MAX_PICTURE if upload else MAX_BODY
        declared = headers.get(b"content-length", b"0")
        response = JSONResponse({"detail": f"the body is larger than {limit:,} bytes"}, 413, {"Connection": "close"})
        if not declared.isdigit() or int(declared) > limit:
            if b"expect" not in headers:  # such a sender waits for an answer before the body
                await _drain(receive)
            return await response(scope, receive, send)
        size, refused, ended = 0, False, False

        async def bounded() -> Any:
            nonlocal size, refused, ended
            message = await receive()
            size += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if size > limit:
                refused = True
                return {"type": "http.request", "body": b"", "more_body": False}
            return message

        async def answered(message: Any) -> None:
            if not refused:
                await send(message)

        await self.app(scope, bounded, answered)
        if refused:
            if not ended:
                await _drain(receive)
            await response(scope, receive, send)


async def _drain(receive: Any) -> None:
    """Read and throw away the rest of a body, within bounds. An answer while the sender still sends would be lost: the
    connection is reset when it is closed with bytes unread."""
    size, until = 0, time.monotonic() + DRAIN_SECONDS
    while size < DRAIN_BYTES and (left := until - time.monotonic()) > 0:
        try:
            message = await asyncio.wait_for(receive(), left)
        except TimeoutError:
            return
        size += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return


class Connection(H11Protocol):
    """A connection that is closed when no complete request comes, and at once when too many are open."""

    most: int = 1000
    """largest number of open connections"""

    def connection_made(self, transport: Any) -> None:
        """Begin a connection."""
        super().connection_made(transport)
        self._waits_since = time.monotonic()
        if len(self.server_state.connections) > self.most:
            transport.abort()
            return
        self.loop.call_later(HEADERS_WITHIN, self._watch)

    def _watch(self) -> None:
        """Close the connection where the headers of the next request are overdue; look again later otherwise."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._waits_since = time.monotonic()
        elif time.monotonic() - self._waits_since >= HEADERS_WITHIN:
            self.transport.close()
            return
        self.loop.call_later(HEADERS_WITHIN / 2, self._watch)


def quiet_loop(loop: asyncio.AbstractEventLoop, every: float = 60.0) -> None:
    """Let an event loop report that it cannot accept connections at most once in a while: asyncio writes a line for
    each connection that waits, thousands a second under a flood.

    Args:
        loop: the event loop of the server.
        every: seconds between two lines.
    """
    last = -every

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal last
        if "_start_serving" in context.get("message", "") and isinstance(context.get("exception"), ValueError):
            return  # asyncio tries to accept again a second after descriptors were short, though the server has ended
        if "out of system resource" not in context.get("message", ""):
            loop.default_exception_handler(context)
        elif time.monotonic() - last >= every:
            last = time.monotonic()
            logger.warning(
                "no file descriptors are left for connections (%s); raise `ulimit -n`", context.get("exception")
            )

    loop.set_exception_handler(handle)


def most_connections() -> int:
    """Number of connections for which this process has file descriptors, after raising the limit as far as allowed."""
    try:
        import resource
    except ImportError:  # Windows
        return Connection.most
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = Connection.most + OTHERS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return Connection.most if soft == resource.RLIM_INFINITY else max(4, min(Connection.most, soft - OTHERS))
