"""The small parts of serving: breakers, buckets, keys, tensors, pictures, settings."""

from __future__ import annotations

import contextlib
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from elastic.core.errors import ConfigError
from serve.asking import to_png
from serve.breaker import Breaker, State
from serve.keys import Bucket, Gate, hash_of, new_key
from serve.refusals import Refusal
from serve.settings import Failing, Key, load_serving
from serve.tensors import DTYPES, Named, from_bytes, from_json, to_bytes, to_json
from tests.served import FakeClock


def test_a_breaker_opens_cools_down_and_closes() -> None:
    breaker = Breaker(Failing(failures=2, cool_down_s=1.0, max_cool_down_s=3.0))
    breaker.failed("once", 0.0)
    assert breaker.may_ask(0.0)
    breaker.failed("twice", 0.0)
    assert (breaker.state, breaker.reason) == (State.OPEN, "twice")
    assert not breaker.may_ask(0.9)
    assert breaker.retry_after_s(0.4) == pytest.approx(0.6)
    waits = []
    now_s = 0.0
    for _ in range(4):
        now_s += breaker.retry_after_s(now_s)
        assert breaker.may_ask(now_s)
        assert breaker.state is State.HALF_OPEN
        breaker.failed("still", now_s)
        waits.append(breaker.retry_after_s(now_s))
    assert waits == [2.0, 3.0, 3.0, 3.0]
    assert breaker.may_ask(now_s + 3)
    breaker.succeeded()
    assert (breaker.state, breaker.reason) == (State.CLOSED, "")


def test_failures_that_are_not_in_a_row_do_not_count() -> None:
    breaker = Breaker(Failing(failures=2))
    for _ in range(5):
        breaker.failed("one", 0.0)
        breaker.succeeded()
    assert breaker.state is State.CLOSED


def test_a_bucket_lets_a_burst_pass_and_then_its_rate() -> None:
    bucket = Bucket(rate_per_s=2.0, burst=3, now_s=0.0)
    assert [bucket.take(0.0) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(0.0) == pytest.approx(0.5)
    assert bucket.take(0.5) == 0
    assert bucket.take(0.5) > 0
    assert [bucket.take(100.0) for _ in range(4)][:3] == [0, 0, 0]  # never more than the burst
    assert bucket.take(99.0) > 0  # a clock that goes back gives nothing


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer \udcff", "x"]
)
def test_without_a_key_nobody_passes(given: str | None) -> None:
    _, digest = new_key()
    with pytest.raises(Refusal) as refusal:
        Gate([Key(name="a", sha256=digest)], FakeClock()).check(given)
    assert refusal.value.status == 401


def test_a_key_is_known_by_its_hash_alone() -> None:
    key, digest = new_key()
    gate = Gate([Key(name="a", sha256=digest, burst=1, rate_per_s=0.5)], FakeClock())
    assert hash_of(key) == digest
    assert gate.check(f"bearer {key}") == "a"
    with pytest.raises(Refusal, match=r"keys.a.rate_per_s 0.5, burst 1") as refusal:
        gate.check(f"Bearer {key}")
    assert (refusal.value.status, refusal.value.retry_after_s) == (429, 2.0)
    with pytest.raises(Refusal) as refusal:
        gate.check(f"Bearer {key}", admin=True)
    assert refusal.value.status == 403
    assert Gate([], FakeClock()).check(None, admin=True) is None


def test_the_rate_of_a_key_is_that_over_all_replicas() -> None:
    (key, digest), clock = new_key(), FakeClock()
    given = Key(name="a", sha256=digest, burst=8, rate_per_s=2.0)
    gates = [Gate([given], clock, 4) for _ in range(4)]

    def num_passed() -> int:
        passed = 0
        for gate in gates:
            with contextlib.suppress(Refusal):
                while gate.check(f"Bearer {key}"):
                    passed += 1
        return passed

    assert num_passed() == 8
    clock.now_s += 2.0
    assert num_passed() == 4


NUMBERS = [name for name in DTYPES if name != "BYTES"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), datatype=st.sampled_from(list(DTYPES)))
def test_tensors_survive_json_and_bytes(seed: int, datatype: str) -> None:
    generator = np.random.default_rng(seed)
    shape = tuple(int(one) for one in generator.integers(0, 4, generator.integers(0, 4)))
    array = generator.integers(0, 2, shape).astype(DTYPES[datatype])
    if datatype == "BYTES":
        array = np.empty(shape, object)
        array[...] = "é text".encode()
    named = Named("x", datatype, np.asarray(array))
    by_json = from_json(to_json(named), 100)
    header, raw = to_bytes(named)
    by_bytes = from_bytes(header, raw, 100)
    for again in (by_json, by_bytes):
        assert again.array.shape == shape
        assert again.array.dtype == DTYPES[datatype]
        assert again.array.tolist() == named.array.tolist()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(raw=st.binary(max_size=64), datatype=st.sampled_from(list(DTYPES)), num=st.integers(0, 9))
def test_any_bytes_are_a_tensor_or_refused(raw: bytes, datatype: str, num: int) -> None:
    header = {"name": "x", "datatype": datatype, "shape": [num]}
    found = None
    with contextlib.suppress(Refusal):
        found = from_bytes(header, raw, 9)
    assert found is None or found.array.shape == (num,)


def test_lengths_inside_of_bytes_are_not_trusted() -> None:
    header = {"name": "x", "datatype": "BYTES", "shape": [1]}
    for raw in (b"", b"\x01", struct.pack("<I", 2**31), struct.pack("<I", 1) + b"ab"):
        with pytest.raises(Refusal):
            from_bytes(header, raw, 9)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_what_the_sample_was(channels: int) -> None:
    generator = torch.Generator().manual_seed(4)
    sample = torch.rand((channels, 5, 7), generator=generator) * 3 - 1.5
    image = np.asarray(Image.open(io.BytesIO(to_png(sample))).convert("RGB"))
    wanted = ((sample.clamp(-1, 1) + 1) * 127.5).round().numpy()
    assert image.shape == (5, 7, 3)
    assert (image[:, :, :channels] == wanted.transpose(1, 2, 0)).all()
    large = np.asarray(Image.open(io.BytesIO(to_png(sample, (14, 10)))).convert("RGB"))
    assert (large[::2, ::2] == image).all()
    with pytest.raises(Refusal):
        to_png(torch.zeros(2, 5, 7))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "repository"),
        ({"repository": "x", "prt": 1}, "did you mean port"),
        ({"repository": "x", "selection": {"kind": "best"}}, "selection kind 'best'"),
        ({"repository": "x", "keys": [{"name": "a", "sha256": "secret"}]}, "sha256"),
        ({"repository": "x", "placement": {"mode": "both"}}, "colocated"),
        ({"repository": "x", "keys": [{"name": "a", "sha256": "0" * 64}] * 2}, "a is there twice"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_serving(given)


def test_settings_come_from_a_folder_or_a_file(tmp_path: Path) -> None:
    assert load_serving(tmp_path, ["port=9000"]).port == 9000
    file = tmp_path / "serving.yaml"
    file.write_text("repository: models/digits\nbatching: {fixed: true}\n")
    assert load_serving(file).batching.fixed
    assert load_serving(file, ["batching.max_rows=3"]).batching.max_rows == 3
