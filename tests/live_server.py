"""The real application on a real uvicorn, in a thread, at a free port; its engine is a fake."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass

import uvicorn
from server_fakes import FakeEngine, wait_until

from flux_nf4.server.listening import bind, configure
from flux_nf4.server.settings import ServeSettings


@dataclass
class LiveServer:
    """`url`, and the fake engine, whose levers must be pulled in its own event loop."""

    url: str
    port: int
    engine: FakeEngine
    loop: asyncio.AbstractEventLoop

    def pull(self, lever, *arguments):
        """Call one of the engine's functions in its event loop."""

        async def call():
            return lever(*arguments)

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(timeout=20)


@contextlib.contextmanager
def live_server(engine=None, **settings):
    """A server for the time of the block."""
    engine = engine or FakeEngine()
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server = uvicorn.Server(configure(ServeSettings(port=port, **settings), engine))
        loops = []

        async def serve():
            loops.append(asyncio.get_running_loop())
            await engine.start()
            await server.serve(sockets=[listener])
            await engine.stop()

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        try:
            wait_until(lambda: server.started)
            live = LiveServer(f"http://127.0.0.1:{port}", port, engine, loops[0])
            yield live
            live.pull(engine.release)
        finally:
            server.should_exit = True
            thread.join()
