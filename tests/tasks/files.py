"""A local file server that can misbehave."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer:
    """Serves ``files`` over HTTP on this machine.

    Args:
        files: content by name.
        cut: how many of the first answers break off half-way.
        ranges: whether requests for the rest of a file are honoured.
        status: answer every request with this error.
    """

    def __init__(self, files: dict[str, bytes], *, cut: int = 0, ranges: bool = True, status: int = 200) -> None:
        self.requests: list[tuple[str, str | None]] = []  # path, Range header
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                outer.requests.append((self.path, asked))
                content = files.get(self.path.lstrip("/"))
                if content is None or status != 200:
                    self.send_error(status if status != 200 else 404)
                    return
                start = int(asked.removeprefix("bytes=").split("-")[0]) if asked and ranges else 0
                if start and start >= len(content):
                    self.send_error(416)
                    return
                body = content[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if len(outer.requests) <= cut else body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/{name}"

    def __enter__(self) -> FileServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
