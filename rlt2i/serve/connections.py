"""Connections that cannot starve a server: one that says nothing, or says it a byte at a time, is hung up on.

uvicorn waits without limit for the first request of a connection and for the reader of a reply, so a few dozen silent
sockets would use up its connections before anybody has shown a token.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from rlt2i.serve.protocol import KNOWN


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with a deadline for the headers of every request and for taking every reply.

    The deadline for headers does not move with each byte. A connection counts as a stranger until the application
    has marked one of its requests as `KNOWN`; of strangers without a request under way only the youngest may stay, and
    where connections run out altogether the one that has waited longest makes room.
    """

    seconds: ClassVar[float]
    most_strangers: ClassVar[int]
    most_connections: ClassVar[int]
    waiting: ClassVar[dict[PatientProtocol, bool]]
    """Connections without a request under way, the oldest first -> whether they are known."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known = False
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self._known = self._known or KNOWN in self.cycle.scope
        if not self.transport.is_closing():
            self._await_headers()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
        super().resume_writing()

    def _await_reader(self, left: int) -> None:
        self._unread = self.loop.call_later(self.seconds, self._look_at_reader, left)

    def _look_at_reader(self, left: int) -> None:
        now = self.transport.get_write_buffer_size()
        if now < left:
            self._await_reader(now)
        else:
            self.transport.abort()

    def _await_headers(self) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(self.seconds, self._hang_up)
        self.waiting[self] = self._known
        strangers = [connection for connection, known in self.waiting.items() if not known]
        if len(strangers) > self.most_strangers:
            strangers[0]._hang_up()
        elif len(self.connections) >= self.most_connections and len(self.waiting) > 1:
            (strangers or list(self.waiting))[0]._hang_up()

    def _stop_waiting(self) -> None:
        self.waiting.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _hang_up(self) -> None:
        self._stop_waiting()
        self.connections.discard(self)
        self.transport.abort()


def patient(*, seconds: float, most_strangers: int, most_connections: int) -> type[PatientProtocol]:
    """The protocol of one server.

    Args:
        seconds: for the headers of a request, counted from the connection or from the last reply; and for a client
            to read more of a reply.
        most_strangers: connections without a request under way that have not been known so far.
        most_connections: of the server.
    """
    limits = {"seconds": seconds, "most_strangers": most_strangers, "most_connections": most_connections}
    return type("Patient", (PatientProtocol,), {**limits, "waiting": {}})
