"""Data read ahead from Parquet, here and on S3: who reads what, and when, changes nothing."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

import examples
from elastic.core.config import JobConfig, load_job
from elastic.driver import run_job
from tests.integration.support import TAG, make_job, outcome
from tests.integration.tasks import OnS3, Tiny

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("cluster")]


def example(name: str, num_workers: int, data: Path) -> JobConfig:
    path = Path(examples.__file__).parent / name / "job.yaml"
    workers = f"workers={{start: {num_workers}, spare: 0}}"
    settings = [f"name={name}{TAG}", f"task_args.data={data}", workers]
    return load_job(path, [*settings, "steps=20", "standby=false"])


@pytest.mark.parametrize("name", ["images", "padded_text"])
def test_one_worker_and_three_learn_the_same(name: str, tmp_path: Path) -> None:
    one, three = (
        run_job(example(name, num, tmp_path / "data.parquet"), run_dir=tmp_path / str(num))
        for num in (1, 3)
    )
    assert outcome(one) == outcome(three)
    assert three.metrics["loss"] < 0.8 * three.metrics["first_loss"]


def write_to_s3(endpoint: str) -> str:
    """The rows of `Tiny` in two files of a folder; its URI."""
    place = {"endpoint_override": endpoint, "scheme": "http", "region": "us-east-1"}
    filesystem = fs.S3FileSystem(
        access_key="user", secret_key="password", allow_bucket_creation=True, **place
    )
    filesystem.create_dir("data")
    tensors = Tiny().dataset()._tensors
    columns = {name: pa.array(list(tensor.numpy())) for name, tensor in tensors.items()}
    columns["features"] = columns["features"].cast(pa.list_(pa.float32(), 16))
    table = pa.table(columns)
    for name, part in (("1", table.slice(0, 3000)), ("2", table.slice(3000))):
        with filesystem.open_output_stream(f"data/{name}.parquet") as out:
            pq.write_table(part, out, row_group_size=100)
    query = "&".join(f"{name}={value}" for name, value in place.items())
    return f"s3://user:password@data?{query}"


def test_data_on_s3_trains_what_the_same_data_in_memory_does(tmp_path: Path) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        uri = write_to_s3("{}:{}".format(*server.get_host_and_port()))
        memory, stored = (
            run_job(make_job("s3", workers=num, steps=10), run_dir=tmp_path / str(num), task=task)
            for num, task in ((1, Tiny()), (2, OnS3(uri=uri)))
        )
    finally:
        server.stop()
    assert outcome(memory) == outcome(stored)
