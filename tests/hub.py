"""A model of the Hugging Face hub on this machine: as much of its interface as streaming a data set needs."""

import hashlib
import http.server
import json
import threading
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "a" * 40


class FakeHub:
    """Serves folders ``owner/name`` under a root as data sets."""

    def __init__(self, root: Path) -> None:
        self.root, self.sent = root, 0
        handler: Any = partial(_Handler, self)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: FakeHub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.hub.sent += len(body)
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def _missing(self, code: str) -> None:
        self._answer(404, b"{}", X_Error_Code=code)

    def _entry(self, repo: Path, path: Path) -> dict[str, Any]:
        name = path.relative_to(repo).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": "d" * 40, "size": 0, "path": name}
        return {"type": "file", "oid": "f" * 40, "size": path.stat().st_size, "path": name}

    def do_HEAD(self) -> None:  # noqa: N802
        self.do_GET()

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        repo = self.hub.root / "/".join(parts[2:4])
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        self._json([self._entry(repo, repo / name) for name in asked if (repo / name).exists()])

    def do_GET(self) -> None:  # noqa: N802
        url = urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        if parts[0] == "datasets" and "resolve" in parts:
            return self._file(self.hub.root / "/".join(parts[1:3]), "/".join(parts[5:]))
        if parts[:2] != ["api", "datasets"] or not (repo := self.hub.root / "/".join(parts[2:4])).is_dir():
            return self._missing("RepoNotFound")
        if len(parts) > 4 and parts[4] == "tree":
            folder = repo / "/".join(parts[6:])
            if not folder.is_dir():
                return self._missing("EntryNotFound")
            deep = parse_qs(url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
            return self._json([self._entry(repo, p) for p in sorted(folder.rglob("*") if deep else folder.iterdir())])
        names = [{"rfilename": p.relative_to(repo).as_posix()} for p in sorted(repo.rglob("*")) if p.is_file()]
        self._json({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": names, "private": False, "tags": []})

    def _file(self, repo: Path, name: str) -> None:
        path = repo / name
        if not path.is_file():
            return self._missing("EntryNotFound")
        data = path.read_bytes()
        # Of the content: the client keeps files by it.
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        headers = {"ETag": etag, "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if "Range" not in self.headers:
            return self._answer(200, data, **headers)
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1 if last else None]
        headers["Content_Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        self._answer(206, part, **headers)
