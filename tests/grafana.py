"""A stand-in for Grafana on loopback: what its API keeps, checks and answers, as far as we ask."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "glsa_right"
Answer = tuple[int, Any]


class GrafanaStub:
    """`requests`: method and path of all that was asked. `fail_next`: so many answers are 503."""

    def __init__(self) -> None:
        self.version = "11.3.0"
        self.sources: dict[str, dict[str, Any]] = {}
        self.folders: dict[str, dict[str, Any]] = {}
        self.dashboards: dict[str, list[dict[str, Any]]] = {}
        self.messages: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.fail_next = 0
        self.url = ""

    @property
    def writes(self) -> list[tuple[str, str]]:
        return [one for one in self.requests if one[0] != "GET"]

    def save(self, dashboard: dict[str, Any], message: str) -> int:
        """As a person does in the browser, too."""
        versions = self.dashboards.setdefault(dashboard["uid"], [])
        versions.append({**dashboard, "id": 7, "version": len(versions) + 1})
        self.messages.setdefault(dashboard["uid"], []).append(message)
        return len(versions)

    def answer(self, method: str, path: str, authorization: str, body: Any) -> Answer:
        self.requests.append((method, path))
        if self.fail_next:
            self.fail_next -= 1
            return 503, {"message": "starting"}
        if path == "/api/health":
            return 200, {"version": self.version, "database": "ok"}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"message": "invalid API key"}
        what, *rest = path.removeprefix("/api/").split("/")
        handler = {"datasources": self._source, "folders": self._folder}.get(what, self._dashboard)
        return handler(method, [unquote(one) for one in rest], body)

    def _source(self, method: str, rest: list[str], body: Any) -> Answer:
        if method == "GET":
            found = self.sources.get(rest[1])
            return (200, found) if found else (404, {"message": "Data source not found"})
        assert {"name", "type", "url", "access"} <= body.keys()
        if method == "POST" and body["name"] in self.sources:
            return 409, {"message": "data source with the same name already exists"}
        self.sources[body["name"]] = {**body, "id": 5, "readOnly": False}
        return 200, {"message": "Datasource added"}

    def _folder(self, method: str, rest: list[str], body: Any) -> Answer:
        if method == "GET":
            found = self.folders.get(rest[0])
            return (200, found) if found else (404, {"message": "folder not found"})
        self.folders[body["uid"]] = body
        return 200, body

    def _dashboard(self, method: str, rest: list[str], body: Any) -> Answer:
        if method == "POST":
            assert body["folderUid"] in self.folders
            assert body["dashboard"]["id"] is None
            assert body["overwrite"] is True
            content = {key: one for key, one in body["dashboard"].items() if key != "id"}
            return 200, {"version": self.save(content, body["message"]), "status": "success"}
        uid = rest[1].partition("?")[0]
        if uid not in self.dashboards:
            return 404, {"message": "Dashboard not found"}
        if rest[2:]:
            return 200, {"versions": [{"message": self.messages[uid][-1]}]}
        return 200, {"dashboard": self.dashboards[uid][-1], "meta": {}}


@contextlib.contextmanager
def grafana_stub(prefix: str = "") -> Iterator[GrafanaStub]:
    """Serve until the end of the block; below a path, if one is given."""
    stub = GrafanaStub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._do()

        do_POST = do_PUT = do_GET

        def _do(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            path = urlsplit(self.path).path
            if not path.startswith(f"{prefix}/api/"):
                self._send(200, b"<html>something else</html>")
                return
            authorization = self.headers.get("Authorization", "")
            path = path.removeprefix(prefix)
            code, value = stub.answer(self.command, path, authorization, body)
            self._send(code, json.dumps(value).encode())

        def _send(self, code: int, data: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        stub.url = f"http://127.0.0.1:{server.server_port}{prefix}"
        yield stub
        server.shutdown()
        thread.join()
