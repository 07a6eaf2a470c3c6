"""A local S3 server for tests. Knows no real account and leaves nothing behind."""

from __future__ import annotations

import itertools
import logging
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
_numbers = itertools.count()


@dataclass(frozen=True)
class Bucket:
    """An empty bucket of a local server."""

    port: int
    name: str

    def uri(self, path: str) -> str:
        query = f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"
        return f"s3://{self.name}/{path}?{query}"

    def make(self) -> None:
        self._request("PUT")

    def drop(self) -> None:
        """Remove the bucket, which must be empty: from now on it refuses everything."""
        self._request("DELETE")

    def _request(self, method: str) -> None:
        url = f"http://127.0.0.1:{self.port}/{self.name}"
        with urllib.request.urlopen(urllib.request.Request(url, method=method)):
            pass


@contextmanager
def s3_server() -> Iterator[int]:
    """Serve S3 on a free port of this machine, within this process. Gives the port."""
    from moto.server import ThreadedMotoServer

    os.environ.update(CREDENTIALS)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


def new_bucket(port: int) -> Bucket:
    bucket = Bucket(port, f"bucket-{os.getpid()}-{next(_numbers)}")
    bucket.make()
    return bucket
