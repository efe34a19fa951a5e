"""The page of a run that goes on, served to this machine alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from megatron_rl.errors import UserError, shown
from megatron_rl.files import reason
from megatron_rl.observe.configurations import CONFIG_FILE
from megatron_rl.observe.run_files import METRICS_FILE, SAMPLES_FILE
from megatron_rl.report.page import to_json
from megatron_rl.report.run import read_run
from megatron_rl.report.run_page import newer, run_page

ADDRESS = "127.0.0.1"
_NAMES = (ADDRESS, "localhost")
_READ = (METRICS_FILE, SAMPLES_FILE, CONFIG_FILE)


class ReportServer(ThreadingHTTPServer):
    """Serves the page of a run, and newer data for it; no other file, and to this machine only.

    A page that another site opens under its own name (DNS rebinding) is refused by its Host.
    """

    daemon_threads = True

    def __init__(self, run_dir: Path, port: int = 0) -> None:
        """port: 0: a free one. UserError: it is taken, or the directory is no run's."""
        read_run(run_dir, begun=False)
        self.run_dir = run_dir
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            told = reason(error) if isinstance(error, OSError) else str(error)
            raise UserError(
                f"--port {port} cannot be used ({told}); expected a free port; leave --port out"
            ) from error

    @property
    def address(self) -> str:
        """Of the page."""
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def version(self) -> str:
        """Of the run's files; another one when a record has been added."""
        parts = []
        for name in _READ:
            path = self.run_dir / name
            facts = path.stat() if path.exists() else None
            parts.append(f"{facts.st_size} {facts.st_mtime_ns}" if facts else "none")
        return hashlib.sha256(", ".join(parts).encode()).hexdigest()[:16]

    def page(self) -> str:
        """The page, as it is now."""
        version = self.version()
        return run_page(read_run(self.run_dir, begun=False), live=version)

    def newer(self, have: str) -> str | None:
        """JSON for a page that has a version; None: there is nothing newer."""
        version = self.version()
        if version == have:
            return None
        return to_json({**newer(read_run(self.run_dir, begun=False)), "version": version})


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    server_version, sys_version = "megatron-rl", ""
    timeout = 30  # seconds a client may take for its request

    def do_GET(self) -> None:
        """Answer ``/`` and ``/data.json``."""
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in _NAMES:
            return self._send(HTTPStatus.FORBIDDEN, "text/plain", "found another host\n")
        asked = urlsplit(self.path)
        if asked.path == "/":
            return self._answer("text/html", self.server.page)
        if asked.path == "/data.json":
            have = parse_qs(asked.query).get("have", [""])[0]
            return self._answer("application/json", lambda: self.server.newer(have))
        return self._send(HTTPStatus.NOT_FOUND, "text/plain", "found no such page\n")

    def _answer(self, kind: str, make: Callable[[], str | None]) -> None:
        try:
            text = make()
        except (UserError, OSError) as error:  # a file that is being replaced, or broken
            return self._send(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n")
        status = HTTPStatus.NO_CONTENT if text is None else HTTPStatus.OK
        return self._send(status, kind, text or "")

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        content = text.encode("utf-8")
        self.send_response(status)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *values: object) -> None:
        """Say nothing of each request."""


def serve(run_dir: Path, port: int, say: Callable[[str], None]) -> None:
    """Serve the page of a run until Ctrl-C. UserError: no run, or the port is taken."""
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port is {shown(str(port))}; expected 0 to 65535")
    with ReportServer(run_dir, port) as server:
        say(server.address)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            return
