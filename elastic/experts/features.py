"""Rows as points that k-means can compare: numbers as they are, words, a column, a model of yours.

Reads one batch of rows at a time and keeps nothing. Letters: N rows, F features.
"""

from __future__ import annotations

import importlib
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from elastic.core.data.columns import Items, Lists, decode
from elastic.core.errors import ConfigError, DataError
from elastic.experts.config import Features

Floats = NDArray[np.floating[Any]]
NUM_BUCKETS = 512
_WORD = re.compile(r"[A-Za-z_]\w{2,}")


def numbers(table: pa.Table, column: str) -> Floats:
    """A column of numbers or lists of one length, shape (N, F), float64."""
    values = decode(table.column(column))
    if isinstance(values, Lists):
        rows = [values[row].numpy() for row in range(len(table))]
        if len({len(row) for row in rows}) > 1:
            raise DataError(f"column {column!r}: lists of different lengths are no features")
        values = np.stack(rows)
    if isinstance(values, Items):
        raise DataError(f"column {column!r} holds text or bytes; features need numbers")
    return values.reshape(len(table), -1).astype(np.float64)


def words(table: pa.Table, column: str) -> Floats:
    """How often each word occurs, by hash, shape (N, NUM_BUCKETS); not yet weighed."""
    values = decode(table.column(column))
    if not isinstance(values, Items):
        raise DataError(f"column {column!r} holds no text")
    counts = np.zeros((len(table), NUM_BUCKETS))
    for row in range(len(table)):
        text = values[row]
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        for word, num in Counter(_WORD.findall(text)).items():
            counts[row, zlib.crc32(word.encode()) % NUM_BUCKETS] += num
    return counts


class Extractor:
    """From a batch of rows to points. For words, `fit` first learns how rare each one is."""

    def __init__(self, features: Features, data_column: str) -> None:
        self._kind = features.kind
        self._column = features.column or data_column
        self._function = _function(features.function) if features.function else None
        self.rarity: Floats | None = None
        """Inverse document frequency of each bucket; of words, once `fit`."""

    @property
    def columns(self) -> Sequence[str] | None:
        """Those to read; None: all."""
        return None if self._function else [self._column]

    def raw(self, table: pa.Table) -> Floats:
        """Points before `fit`."""
        if self._function is not None:
            found = np.asarray(self._function(table), dtype=np.float64)
            if found.ndim != 2 or len(found) != len(table):
                raise DataError(
                    f"partition.features.function returned shape {found.shape} for {len(table)}"
                    " rows; needs (rows, features)"
                )
            return found
        return words(table, self._column) if self._kind == "words" else numbers(table, self._column)

    def fit(self, raw_NF: Floats) -> None:
        """Learn from a sample of raw points."""
        if self._kind == "words":
            present_F = (raw_NF > 0).sum(0)
            self.rarity = np.log((1 + len(raw_NF)) / (1 + present_F)) + 1

    def finish(self, raw_NF: Floats) -> Floats:
        """Points as k-means gets them; of words tf-idf of length 1."""
        if self.rarity is None:
            return raw_NF
        weighed = np.log1p(raw_NF) * self.rarity
        length_N1 = np.linalg.norm(weighed, axis=1, keepdims=True)
        points: Floats = weighed / np.maximum(length_N1, 1e-12)
        return points


def _function(reference: str) -> Callable[[pa.Table], Any]:
    module_name, _, attribute = reference.partition(":")
    try:
        found: Callable[[pa.Table], Any] = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"partition.features.function: cannot import {reference}: {error}"
        ) from error
    return found
