"""Listening, and stopping: uvicorn with limits of its own, and an end in which no work is lost."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from flux_nf4.errors import InputError
from flux_nf4.server.app import build_app

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from flux_nf4.server.engine import Engine
    from flux_nf4.server.settings import ServeSettings

_MAX_HEADER_BYTES = 64 * 1024
_BACKLOG = 1024
# After the work is done: for answers that are still being sent.
_CLOSE_TIMEOUT_S = 5


def bind(host: str, port: int) -> socket.socket:
    """A socket at `host` and `port` (0: any that is free), bound before anything is loaded.

    Raises:
        InputError: the port is taken or not ours to take, or there is no such host here.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"`--host {host}`: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} of `{host}` is in use",
                hint="another server may be running; stop it, or give another `--port`",
            ) from error
        if error.errno == errno.EACCES:
            raise InputError(
                f"port {port} of `{host}` needs rights that you do not have",
                hint="give a `--port` above 1023",
            ) from error
        raise InputError(f"cannot listen at `{host}`, port {port}: {error.strerror}") from error
    return listener


async def serve(
    settings: ServeSettings,
    engine: Engine,
    listener: socket.socket,
    *,
    on_ready: Callable[[], None] = lambda: None,
    on_stopping: Callable[[], None] = lambda: None,
) -> signal.Signals | None:
    """Serve until a signal says to stop; then finish what was taken on, and return.

    The first signal closes the door: `/readyz` and new requests get 503 at once, and what is in
    the queue is drawn for up to `drain_timeout_s`. The second stops at once, and is returned; None
    says that nothing was cut short.

    Raises:
        FluxNF4Error: the engine cannot be started, or the model not loaded.
    """
    loop = asyncio.get_running_loop()
    stopping: asyncio.Task[None] | None = None
    cut_short_by: signal.Signals | None = None

    async def stop_gently() -> None:
        await engine.drain(settings.drain_timeout_s)
        await engine.stop()
        server.should_exit = True

    def on_signal(number: int) -> None:
        nonlocal stopping, cut_short_by
        if stopping is None:
            stopping = loop.create_task(stop_gently())
            on_stopping()
            return
        if not server.should_exit:
            cut_short_by = signal.Signals(number)
        stopping.cancel()
        server.should_exit = server.force_exit = True

    def on_loaded(loading: asyncio.Task[None]) -> None:
        if loading.cancelled():
            return
        if loading.exception() is None:
            on_ready()
        else:
            server.should_exit = True

    server = _Server(configure(settings, engine), on_signal)
    await engine.start()
    loading = loop.create_task(engine.wait_ready())
    loading.add_done_callback(on_loaded)
    try:
        await server.serve(sockets=[listener])
    finally:
        loading.cancel()
        await engine.stop()
    with contextlib.suppress(asyncio.CancelledError):
        await loading
    return cut_short_by


def configure(settings: ServeSettings, engine: Engine) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        build_app(settings, engine),
        http=_protocol(settings.header_timeout_s),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=settings.max_connections,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
    )


class _Server(uvicorn.Server):
    """A server of uvicorn's with its signals handed to `serve`."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[int], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Called by Python between two instructions: the event loop takes it from there."""
        self._loop.call_soon_threadsafe(self._on_signal, sig)


def _protocol(header_timeout_s: float) -> type[H11Protocol]:
    """Its protocol, which drops whoever does not come to the end of his headers in time."""

    class ImpatientProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_watching()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._stop_watching()
            elif self._timer is None:
                self._timer = self.loop.call_later(header_timeout_s, self.transport.close)

        def _stop_watching(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return ImpatientProtocol
