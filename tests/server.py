"""A web server on this machine that can fail in the ways servers do."""

import http.server
import socket
import struct
import threading
from functools import partial
from pathlib import Path
from typing import Any


class Server:
    """Serves a folder; the first ``faults`` requests for a body go wrong.

    Kinds: a number answers with that status, ``half`` closes after half of the body, ``reset`` breaks the connection,
    ``listing`` breaks it when a folder inside is asked for.
    """

    def __init__(self) -> None:
        self.faults, self.kind, self.ranges, self.requests, self.sent = 0, "500", False, 0, 0
        self._servers: list[http.server.ThreadingHTTPServer] = []

    def serve(self, folder: Path, faults: int = 0, kind: str = "500", ranges: bool = False) -> str:
        """The address of the folder."""
        self.faults, self.kind, self.ranges = faults, kind, ranges
        handler: Any = partial(_Handler, self, directory=str(folder))
        return self._start(handler)

    def serve_bodies(self, bodies: dict[str, bytes]) -> str:
        """The address of a server that sends these and says nothing of them: no length, no date."""
        handler: Any = partial(_Silent, bodies)
        return self._start(handler)

    def serve_redirects(self) -> str:
        """The address of a server that sends everyone on, for ever."""
        return self._start(_Elsewhere)

    def _start(self, handler: Any) -> str:
        server = _Patient(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self._servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    def close(self) -> None:
        """Stop serving."""
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Patient(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # sixteen threads ask at once; five may wait otherwise


class _Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, state: Server, *args: Any, **kwargs: Any) -> None:
        self.state = state
        super().__init__(*args, **kwargs)

    def log_message(self, *args: Any) -> None:
        pass

    def end_headers(self) -> None:
        if self.state.ranges:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def do_GET(self) -> None:  # noqa: N802  (http.server asks for this name)
        self.state.requests += 1
        path = Path(self.translate_path(self.path))
        if self.state.kind == "403":
            return self.send_error(403)
        if not path.is_file():
            if self.state.kind == "listing" and self.state.faults > 0 and self.path != "/":
                self.state.faults -= 1
                return self._fail(b"")
            return super().do_GET()
        data = path.read_bytes()
        if self.state.faults > 0:
            self.state.faults -= 1
            return self._fail(data)
        if self.state.ranges and "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1 if last else None]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
            data = part
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        self.end_headers()
        self.state.sent += len(data)
        self.wfile.write(data)

    def _fail(self, data: bytes) -> None:
        self.close_connection = True
        if self.state.kind.isdigit():
            return self.send_error(int(self.state.kind))
        if self.state.kind == "half":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            return None
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
        self.connection.close()
        return None


class _Silent(http.server.BaseHTTPRequestHandler):
    def __init__(self, bodies: dict[str, bytes], *args: Any) -> None:
        self.bodies = bodies
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:  # noqa: N802  (http.server asks for this name)
        self.send_response(200 if self.path in self.bodies else 404)
        self.end_headers()

    def do_GET(self) -> None:  # noqa: N802  (http.server asks for this name)
        self.do_HEAD()
        self.wfile.write(self.bodies.get(self.path, b""))


class _Elsewhere(_Silent):
    def __init__(self, *args: Any) -> None:
        super().__init__({}, *args)

    def do_HEAD(self) -> None:  # noqa: N802  (http.server asks for this name)
        self.send_response(302)
        self.send_header("Location", self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()
