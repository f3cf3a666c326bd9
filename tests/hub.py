"""A model of the Hugging Face hub on this machine.

As much of its interface as streaming a data set needs, and pushing a model and loading it again.
"""

import base64
import hashlib
import http.server
import json
import threading
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "a" * 40
TOKEN = "hf_right"
"""The one token there is: of the account ``me``, which may write under its own name."""


class FakeHub:
    """Serves folders ``owner/name`` under a root as data sets, and those under ``models`` in it as models.

    Args:
        root: The folder.
        refuses: Part of an address that it refuses to write to.
    """

    def __init__(self, root: Path, refuses: str = "/nothing/") -> None:
        self.root, self.sent, self.refuses = root, 0, refuses
        self.private: set[str] = set()
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

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json")

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
        if parts[:2] in (["api", "repos"], ["api", "models"]):
            return self._write(parts[2:], body)
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        repo = self.hub.root / "/".join(parts[2:4])
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        self._json([self._entry(repo, repo / name) for name in asked if (repo / name).exists()])

    def _write(self, parts: list[str], body: str) -> None:
        """Make a model's repository, say how its files are to be sent, or take them."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if self.hub.refuses in self.path:
            return self._json({"error": "the disk is full"}, 400)
        asked = [json.loads(line) for line in body.splitlines()]
        owner = asked[0].get("organization") or "me" if parts == ["create"] else parts[0]
        if owner != "me":
            return self._json({"error": f"You don't have the rights to create a model under {owner!r}"}, 403)
        name = f"me/{asked[0]['name'] if parts == ['create'] else parts[1]}"
        folder, address = self.hub.root / "models" / name, f"{self.hub.address}/{name}"
        if parts == ["create"]:
            there = folder.is_dir()
            folder.mkdir(parents=True, exist_ok=True)
            self.hub.private |= {name} if asked[0].get("visibility") == "private" else set()
            return self._json({"url": address}, 409 if there else 200)
        if parts[2] == "preupload":
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return self._json({"files": [{"path": file["path"], **how} for file in asked[0]["files"]]})
        for file in [line["value"] for line in asked if line["key"] == "file"]:
            (folder / file["path"]).write_bytes(base64.b64decode(file["content"]))
        self._json({"commitOid": COMMIT, "commitUrl": f"{address}/commit/{COMMIT}"})

    def _model(self, name: str) -> None:
        if not (self.hub.root / "models" / name).is_dir():
            return self._missing("RepoNotFound")
        self._json({"id": name, "sha": COMMIT, "siblings": [], "private": name in self.hub.private, "tags": []})

    def do_GET(self) -> None:  # noqa: N802
        url = urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        if parts == ["api", "whoami-v2"]:
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            return self._json({"name": "me"} if known else {"error": "Invalid token"}, 200 if known else 401)
        if parts[:2] == ["api", "models"]:
            # A model has no folders, which transformers asks for.
            return self._missing("EntryNotFound") if "tree" in parts else self._model("/".join(parts[2:4]))
        if parts[2:3] == ["resolve"]:
            return self._file(self.hub.root / "models" / parts[0] / parts[1], "/".join(parts[4:]))
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
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        headers = {"ETag": etag, "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if "Range" not in self.headers:
            return self._answer(200, data, **headers)
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1 if last else None]
        headers["Content_Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        self._answer(206, part, **headers)
