"""Data on S3, from a server that the test starts: files, folders, laziness, damage, addresses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from elastic.core.data.rows import Rows
from elastic.core.data.text import TextWindows
from elastic.core.errors import DataError

TABLE = pa.table({"x": range(8), "text": ["ab" * n for n in range(8)]})


@dataclass(frozen=True)
class Bucket:
    """An S3 bucket on this machine."""

    filesystem: fs.S3FileSystem
    name: str
    endpoint: str

    def uri(self, path: str) -> str:
        query = f"endpoint_override={self.endpoint}&scheme=http&region=us-east-1"
        return f"s3://user:password@{self.name}/{path}?{query}"

    def write_parquet(self, path: str, table: pa.Table) -> None:
        with self.filesystem.open_output_stream(f"{self.name}/{path}") as out:
            pq.write_table(table, out, row_group_size=2, write_page_checksum=True)


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    filesystem = fs.S3FileSystem(
        access_key="user",
        secret_key="password",
        region="us-east-1",
        scheme="http",
        endpoint_override=f"{host}:{port}",
        allow_bucket_creation=True,
    )
    filesystem.create_dir("data")
    yield Bucket(filesystem, "data", f"{host}:{port}")
    server.stop()


def test_rows_of_a_folder_on_s3(bucket: Bucket) -> None:
    bucket.write_parquet("folder/1.parquet", TABLE.slice(0, 5))
    bucket.write_parquet("folder/2.parquet", TABLE.slice(5))
    data = Rows(bucket.uri("folder"))
    assert len(data) == 8
    data.prefetch(np.array([3, 7]))
    rows = data.fetch(np.array([7, 0, 3]))
    assert rows["x"].tolist() == [7, 0, 3]
    assert rows["text"] == ["ab" * 7, "", "ab" * 3]
    both = Rows([bucket.uri("folder/2.parquet"), bucket.uri("folder/1.parquet")])
    assert both.fetch(np.arange(4))["x"].tolist() == [5, 6, 7, 0]


def test_text_and_arrow_files_on_s3(bucket: Bucket) -> None:
    with (
        bucket.filesystem.open_output_stream("data/a.arrow") as out,
        pa.ipc.new_file(out, TABLE.schema) as writer,
    ):
        writer.write_table(TABLE, max_chunksize=3)
    data = Rows(bucket.uri("a.arrow"), ["text"])
    assert data.fetch(np.array([4, 1])) == {"text": ["ab" * 4, "ab"]}
    windows = TextWindows(bucket.uri("a.arrow"), context=5).fetch(np.array([1]))
    assert bytes(windows[0].tolist()) == b"bababa"


def test_damage_on_s3_is_named_when_it_is_read(bucket: Bucket) -> None:
    """Rows there are too far away to check them all before training starts."""
    bucket.write_parquet("damaged.parquet", TABLE)
    with bucket.filesystem.open_input_file("data/damaged.parquet") as stored:
        content = bytearray(stored.read())
    column = pq.ParquetFile(pa.BufferReader(bytes(content))).metadata.row_group(2).column(0)
    content[column.data_page_offset - 4] ^= 0xFF
    with bucket.filesystem.open_output_stream("data/damaged.parquet") as out:
        out.write(bytes(content))
    data = Rows(bucket.uri("damaged.parquet"), ["x"])
    data.check()
    assert data.fetch(np.array([0]))["x"].tolist() == [0]
    with pytest.raises(DataError, match=r"^s3://data/damaged.parquet: row group 2: cannot be read"):
        data.fetch(np.array([5]))


def test_what_is_not_there_is_named_without_the_password(bucket: Bucket) -> None:
    with pytest.raises(DataError, match=r"^s3://data/no.parquet: there is no such file or folder$"):
        Rows(bucket.uri("no.parquet"))
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, TABLE.schema) as writer:
        writer.write_table(TABLE)
    with bucket.filesystem.open_output_stream("data/stream.arrow") as out:
        out.write(stream.getvalue())
    with pytest.raises(DataError, match=r"^s3://data/stream.arrow: is an Arrow stream.*Parquet$"):
        Rows(bucket.uri("stream.arrow"))
