"""Writes scikit-learn's 8 x 8 digits as Parquet: 1000 to train on, 797 to judge by.

python -m examples.digits_experts.data
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

FOLDER = Path("data/digits")
NUM_TRAIN = 1000


def main() -> None:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.data[order] / 8 - 1).astype(np.float32)  # 0..16 become -1..1
    for name, part in (("train", slice(NUM_TRAIN)), ("test", slice(NUM_TRAIN, None))):
        column = pa.FixedSizeListArray.from_arrays(pa.array(images[part].ravel()), 64)
        table = pa.table({"image": column, "digit": digits.target[order][part]})
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
        pq.write_table(table, FOLDER / name / "part-0.parquet", row_group_size=64)


if __name__ == "__main__":
    main()
