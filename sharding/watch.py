"""Every process of a run knows at once when another is gone, and which.

Process 0 holds a connection to each of the others. When a process dies, its machine closes the
connection; when a machine dies, the connection's keep-alive fails within `SILENT_SECONDS`. Neither
needs Python, so that a process which is busy for minutes is not taken for dead. jax's own service
takes longer, ends the process by SIGABRT, and does not say who was lost.
"""

import atexit
import contextlib
import ctypes
import math
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

SILENT_SECONDS = 9  # Three unanswered questions, two seconds apart, after three of silence.
# A process that ends says so. The others have so long to end too before they are ended.
LEFT_SECONDS = 10
CONNECT_SECONDS = 60
BYE = "bye"


class Watch:
    """Calls `lost` in a thread of its own, with a line that says which process was lost.

    client: jax's, which carries the port from process 0 to the others. host: of process 0. Where
    it is not to be reached, a line says so, and only jax's service watches that process.
    """

    def __init__(
        self, client: Any, host: str, index: int, count: int, lost: Callable[[str], None]
    ):
        self._count, self._lost = count, lost
        self._leaving, self._all_gone = threading.Event(), threading.Event()
        self._in_order = True
        self._peers = _accept(client, count) if index == 0 else _reach(client, host, index)
        for connection in self._peers.values():
            _keep_alive(connection)
        # jax aborts where process 0 or its service is gone; sleep(SIGABRT) is six seconds, in which
        # the thread below says which process it was.
        libc = ctypes.CDLL(None)
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
        if self._peers:
            threading.Thread(target=self._listen, name="watch", daemon=True).start()
        atexit.register(self.leave)

    def leave(self, seconds: float = 0.0) -> bool:
        """Tells the others that this process ends; whether within `seconds` all say that they do."""
        if not self._leaving.is_set():
            self._leaving.set()
            self._tell(BYE)
        return self._all_gone.wait(seconds) and self._in_order

    def _tell(self, word: str) -> None:
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{word}\n".encode())

    def _listen(self) -> None:
        selector = selectors.DefaultSelector()
        for index, connection in self._peers.items():
            selector.register(connection, selectors.EVENT_READ, index)
        left: set[int] = set()
        deadline = math.inf
        while time.monotonic() < deadline or self._leaving.is_set():
            for key, _ in selector.select(timeout=0.5):
                word = _hear(key.fileobj)
                if word != BYE and not self._leaving.is_set():
                    gone = word or key.data
                    self._end(f"process {gone} of {self._count} is lost", gone)
                self._in_order &= word == BYE
                selector.unregister(key.fileobj)
                left.add(key.data)
                deadline = min(deadline, time.monotonic() + LEFT_SECONDS)
            if len(left) == len(self._peers):
                self._all_gone.set()
        names = " and ".join(map(str, sorted(left)))
        self._end(f"process {names} of {self._count} has ended, and this one has not", names)

    def _end(self, line: str, gone: str | int) -> None:
        self._tell(str(gone))
        self._lost(line)


def _accept(client: Any, count: int) -> dict[int, socket.socket]:
    """The connections of process 0, by the other's index."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    peers: dict[int, socket.socket] = {}
    deadline = time.monotonic() + CONNECT_SECONDS
    with socket.create_server(
        ("", 0), family=family, dualstack_ipv6=dual, backlog=count
    ) as server:
        server.settimeout(1.0)
        client.key_value_set("batiste/watch", str(server.getsockname()[1]))
        while len(peers) < count - 1 and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                word = _hear(connection)
                if word.isdecimal() and 0 < int(word) < count:
                    peers[int(word)] = connection
    return peers


def _reach(client: Any, host: str, index: int) -> dict[int, socket.socket]:
    """The connection of another process to process 0; none, and a line, where it cannot be made."""
    port = int(client.blocking_key_value_get("batiste/watch", CONNECT_SECONDS * 1000))
    try:
        connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS / 2)
        connection.sendall(f"{index}\n".encode())
    except OSError as error:
        print(f"process {index} does not reach port {port} of process 0 ({error}): should it be "
              "lost, the others will notice only after a minute", file=sys.stderr, flush=True)
        return {}
    return {0: connection}


def _hear(connection: socket.socket) -> str:
    """The next word; none where the connection is broken. Nobody says two that matter."""
    try:
        connection.settimeout(CONNECT_SECONDS)
        words = connection.recv(64).decode("ascii", "replace").split()
    except OSError:
        words = []
    return words[0] if words else ""


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 3), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3),
                        ("TCP_USER_TIMEOUT", 1000 * SILENT_SECONDS)):
        if hasattr(socket, name):  # Linux has all of them.
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
