"""Connections of clients that must not take for ever to say what they want, nor crowd out those who came before.

uvicorn --http connections:PromptProtocol --limit-concurrency 200
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0  # in which the headers of a request must have come
CROWDED = b"""HTTP/1.1 503 Service Unavailable\r
Retry-After: 1\r
Content-Type: application/json\r
Content-Length: 39\r
Connection: close\r
\r
{"detail":"expected fewer connections"}"""


class PromptProtocol(H11Protocol):
    """HTTP/1.1 with limits for the number of connections, and for the time in which a request's headers come.

    uvicorn itself has a limit for what comes between two requests only, not for the first request, nor for headers that
    come one byte at a time. The bodies of requests have their own limit in `app.py`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._most, self.limit_concurrency = self.limit_concurrency, None  # each connection has one request at a time

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in H11Protocol
        """A client has connected."""
        super().connection_made(transport)
        if self._most is not None and len(self.connections) > self._most:
            transport.write(CROWDED)
            transport.close()
        else:
            self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """A client has sent a part of a request."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._expect_headers()
        else:  # the headers are whole
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._drop)

    def _drop(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
