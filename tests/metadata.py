"""A local server that stands where the metadata services of AWS and Google would be."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "secret-token"
SPOT = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
PREEMPTED = "/computeMetadata/v1/instance/preempted"


@dataclass
class Metadata:
    """What a cloud's metadata service would answer, and what it was asked."""

    answers: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=lambda: [TOKEN])
    """Given one after the other, the last one again and again; only the newest is valid."""
    etag: str = "e1"
    asked: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    port: int = 0
    changed: threading.Event = field(default_factory=threading.Event)
    valid: str = ""

    def respond(self, request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        url = urlsplit(request.path)
        self.asked.append((request.command, request.path))
        if url.path == "/latest/api/token":
            self._check(request.command == "PUT", "a token is made by PUT")
            life = request.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            self._check(life.isdigit() and 0 < int(life) <= 21600, "its life is given")
            self.valid = self.tokens.pop(0) if len(self.tokens) > 1 else self.tokens[0]
            return 200, {}, self.valid.encode()
        if url.path.startswith("/latest/"):
            if request.headers.get("X-aws-ec2-metadata-token") != self.valid:
                return 401, {}, b""
        elif request.headers.get("Metadata-Flavor") != "Google":
            return 403, {}, b""
        query = parse_qs(url.query)
        if query.get("wait_for_change") == ["true"]:
            self._check(query["last_etag"] == [self.etag], "the last etag is given back")
            self.changed.wait(float(query["timeout_sec"][0]))
        answer = self.answers.get(url.path)
        headers = {"ETag": self.etag, "Metadata-Flavor": "Google", **self.headers}
        return (404, {}, b"") if answer is None else (200, headers, answer)

    def _check(self, is_so: bool, what: str) -> None:
        if not is_so:
            self.problems.append(what)

    @property
    def variables(self) -> dict[str, str]:
        """What leads its askers here."""
        host = f"127.0.0.1:{self.port}"
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{host}/", "GCE_METADATA_HOST": host}


@contextmanager
def metadata_server() -> Iterator[Metadata]:
    """A server until the end of the block; whatever was asked in a wrong way fails the test."""
    service = Metadata()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            status, headers, body = service.respond(self)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = _answer

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        service.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield service
        finally:
            service.changed.set()
            server.shutdown()
            thread.join()
    assert service.problems == []
