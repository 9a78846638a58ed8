"""The server's own process, as a worker sees it: two pipes, and the memory that they share."""

from __future__ import annotations

import os
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from flux_nf4.server.frames import pack_frame, put_shared, read_frame

if TYPE_CHECKING:
    from PIL.Image import Image


class Parent:
    """The other end of the pipes."""

    def __init__(self) -> None:
        self._input = os.fdopen(_moved_away(0, os.open(os.devnull, os.O_RDONLY)), "rb")
        self._output = os.fdopen(_moved_away(1, os.dup(2)), "wb", buffering=0)
        self._taken = threading.Event()
        self._taken.set()
        self.cancelled: set[str] = set()
        self.orders: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self.budgets: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._sending = threading.Lock()
        self.settings = read_frame(self._input) or _end()
        self.shared: int = self.settings["shared_memory"]
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, kind: str, **values: Any) -> None:
        """Tell the parent; the process ends where there is none."""
        rest = memoryview(pack_frame({"kind": kind} | values))
        try:
            with self._sending:
                while rest:
                    rest = rest[self._output.write(rest) or 0 :]
        except BrokenPipeError:
            _end()

    def send_image(self, kind: str, image: Image, **values: Any) -> None:
        """Tell the parent, with an image beside; waits until the one before was taken."""
        self._taken.wait()
        self._taken.clear()
        put_shared(self.shared, [image.convert("RGB").tobytes()])
        size = {"width": image.width, "height": image.height}
        self.send(kind, **values | ({"preview": size} if kind == "step" else size))

    def _listen(self) -> None:
        while (frame := read_frame(self._input)) is not None:
            match frame["kind"]:
                case "cancel":
                    self.cancelled.add(frame["job"])
                case "taken":
                    self._taken.set()
                case "memory":
                    self.budgets.put(frame)
                case _:
                    self.orders.put(frame)
        _end()


def _moved_away(descriptor: int, replacement: int) -> int:
    """Where a descriptor's file can be reached from now on; in its place is the replacement's."""
    moved = os.dup(descriptor)
    os.dup2(replacement, descriptor)
    os.close(replacement)
    return moved


def _end() -> Any:
    # Not `sys.exit`: the main thread may be inside a step of several seconds.
    os._exit(0)
