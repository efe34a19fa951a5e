"""A server that sends any bytes, valid HTTP or not."""

from __future__ import annotations

import socket
import threading
from typing import Callable, Iterable

#: Responds on a connection whose request has been read; the event says that the server ends.
Behaviour = Callable[[socket.socket, threading.Event], None]


def response(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """A valid response. It has the right length, unless a header gives another."""
    lines = [f"HTTP/1.1 {status}", *headers]
    if not any(h.lower().startswith(("content-length", "transfer-encoding")) for h in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def sending(parts: Iterable[bytes], pause: float = 0.0) -> Behaviour:
    """Sends the parts, with a pause after each, and hangs up."""

    def behave(connection: socket.socket, ended: threading.Event) -> None:
        for part in parts:
            connection.sendall(part)
            if pause and ended.wait(pause):
                return

    return behave


def silence(connection: socket.socket, ended: threading.Event) -> None:
    """Sends nothing."""
    ended.wait(60.0)


class RawServer:
    """Serves until closed. ``asked``: the requests as bytes. ``hung_up``: how many clients left
    before they had everything.
    """

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.asked: list[bytes] = []
        self.hung_up = 0
        self._ended = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> RawServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._listening.shutdown(socket.SHUT_RDWR)  # this ends `accept`
        self._listening.close()

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            try:
                self.asked.append(_request(connection))
                self.behaviour(connection, self._ended)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(10.0)
                while connection.recv(1 << 16):  # until the other side has read it all
                    pass
            except OSError:
                self.hung_up += 1


def _request(connection: socket.socket) -> bytes:
    connection.settimeout(30.0)
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(1 << 16)
        if not part:
            return data
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    length = int(lengths[0].split(b":")[1]) if lengths else 0
    while len(body) < length:
        body += connection.recv(1 << 16)
    return head + b"\r\n\r\n" + body
