"""Writes the source of the Python standard library as Parquet, a file a row; every tenth to test.

python -m examples.stdlib_experts.data
"""

from pathlib import Path

from examples.stdlib_lm.texts import stdlib_texts, write_texts

FOLDER = Path("data/stdlib")


def main() -> None:
    texts = stdlib_texts()
    write_texts([text for n, text in enumerate(texts) if n % 10], FOLDER / "train/part-0.parquet")
    write_texts(texts[::10], FOLDER / "test/part-0.parquet")


if __name__ == "__main__":
    main()
