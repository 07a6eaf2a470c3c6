"""The source of the Python standard library as Parquet."""

import contextlib
import sysconfig
import uuid
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def stdlib_texts() -> list[str]:
    """The library's files, without its tests."""
    root, texts = Path(sysconfig.get_path("stdlib")), []
    for file in sorted(root.rglob("*.py")):
        if not {"test", "tests", "site-packages"} & set(file.relative_to(root).parts):
            with contextlib.suppress(UnicodeDecodeError):
                texts.append(file.read_text("utf-8"))
    return texts


def write_texts(texts: Sequence[str], path: Path) -> None:
    """Write them, one a row; safe for several processes at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    pq.write_table(pa.table({"text": texts}), draft, row_group_size=64, write_page_checksum=True)
    draft.replace(path)
