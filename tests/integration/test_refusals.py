"""What a job asks that cannot be kept is refused, by name, with the type that was raised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic.core.errors import DataError, FatalError, StoreError, TaskError
from elastic.core.runs import RunFolder
from tests.integration.support import make_job, run_job
from tests.integration.tasks import OnText, Tiny, Weightless, WithCounting, WithLBFGS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("cluster")]


def corrupt_text(folder: Path) -> Tiny:
    """A Parquet file of three row groups, with a byte changed in the second."""
    path = folder / "text.parquet"
    texts = [f"{number} " * 200 for number in range(3)]
    pq.write_table(
        pa.table({"text": texts}),
        path,
        row_group_size=1,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 9] ^= 1
    path.write_bytes(data)
    return OnText(path=str(path))


CASES: dict[str, tuple[Callable[[Path], Tiny], type[FatalError], str]] = {
    "optimizer": (lambda _: WithLBFGS(), TaskError, "LBFGS is refused"),
    "parameter": (lambda _: WithCounting(), TaskError, r"the parameter layers\.1\.bias"),
    "weight": (lambda _: Weightless(), FatalError, "step 0: the weights add up to 0.0"),
    "data": (corrupt_text, DataError, "text.parquet.*row group 1"),
    "memory": (lambda _: Tiny(width=4096), StoreError, "MiB of shared memory are needed and"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_kept_is_refused(case: str, tmp_path: Path) -> None:
    make_task, kind, message = CASES[case]
    workers = 1024 if case == "memory" else 1
    job = make_job(case, task="").model_copy()
    job = job.model_copy(update={"workers": job.workers.model_copy(update={"max": workers})})
    with pytest.raises(kind, match=message):
        run_job(job, run_dir=tmp_path / "run", task=make_task(tmp_path))
    run = RunFolder(tmp_path / "run")
    assert run.read_events()[-1]["kind"] == "job_failed"
    assert run.read_metrics() == []
    assert not run.ray_json.exists()
