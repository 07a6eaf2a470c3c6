"""The service over HTTP, without Ray: protocols, errors in their forms, limits, swaps, keys."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from elastic.core.experts.repository import Repository
from serve.app import describe
from serve.keys import new_key
from serve.pool import Slow
from serve.version import identity_of
from serve.work import noise_of
from tests.integration.support import wait_until
from tests.served import SHAPE, Http, http, make_repository, trained


@pytest.fixture
def flow(tmp_path: Path) -> Path:
    make_repository(tmp_path / "flow")
    return tmp_path / "flow"


@pytest.fixture
def served(flow: Path) -> Iterator[Http]:
    with http(flow) as running:
        yield running


def picture(response: httpx.Response, index: int = 0) -> np.ndarray:
    data = base64.b64decode(response.json()["data"][index]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)))


def test_health_and_metadata_tell_the_truth(served: Http) -> None:
    assert served.get("/v2").json()["extensions"] == ["binary_tensor_data", "model_repository"]
    assert served.get("/v2/health/live").status_code == 200
    assert served.get("/v2/health/ready").status_code == 200
    about = served.get("/v2/models/tiny").json()
    assert [one["name"] for one in about["inputs"]] == ["seed", "noise"]
    pinned = f"/v2/models/tiny/versions/{about['versions'][0]}"
    assert served.get(pinned).json() == about
    assert served.get(pinned + "/ready").json() == {"name": "tiny", "ready": True}
    assert served.get("/v2/models/other").status_code == 404
    served.pool.faults = dict.fromkeys(range(3), lambda _: Slow("dead"))
    refused = served.infer("seed", "INT64", [1])
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert served.get("/v2/health/live").status_code == 200
    assert served.get("/v2/health/ready").status_code == 503
    assert served.get("/v2/models/tiny/ready").status_code == 503
    served.pool.faults.clear()  # probes find out without any request
    wait_until(lambda: served.get("/v2/health/ready").status_code == 200, "ready again")


def test_a_seed_gives_its_sample_in_every_form(served: Http) -> None:
    answer = served.infer("seed", "INT64", [5, 6])
    body = answer.json()
    assert answer.headers["x-elastic-experts"] == "expert-0,expert-1,expert-2"
    assert answer.headers["x-elastic-degraded"] == "false"
    (sample,) = body["outputs"]
    assert (sample["shape"], sample["datatype"]) == ([2, *SHAPE], "FP32")
    noise = noise_of(6, SHAPE).flatten().tolist()
    by_noise = served.infer("noise", "FP32", noise, shape=[1, *SHAPE], id="mine")
    assert by_noise.json()["id"] == "mine"
    assert by_noise.json()["outputs"][0]["data"] == pytest.approx(sample["data"][16:], abs=1e-4)
    asked = {"prompt": "", "seed": 5, "n": 2, "trace": True, "size": "8x12"}
    images = served.post("/v1/images/generations", asked)
    assert picture(images).shape == (12, 8)
    values = (np.clip(np.array(sample["data"][:16]).reshape(4, 4), -1, 1) + 1) * 127.5
    assert np.abs(picture(images)[::3, ::2] - values).max() <= 1
    weights = np.array(images.json()["trace"]["weights"])
    assert weights.shape == (2, 5, 3)
    assert weights.sum(2) == pytest.approx(np.ones((2, 5)))


def test_selection_steps_and_experts_may_be_chosen(served: Http) -> None:
    given = {"num_steps": 3, "selection": "top_k", "k": 1}
    answer = served.infer("seed", "UINT8", [5], parameters=given, outputs=[{"name": "weights"}])
    assert answer.json()["outputs"][0]["shape"] == [1, 3, 3]
    assert set(answer.json()["outputs"][0]["data"]) == {0.0, 1.0}
    alone = served.post(
        "/v1/images/generations", {"prompt": "", "model": "expert-1", "response_format": "b64_json"}
    )
    assert alone.headers["x-elastic-experts"] == "expert-1"


def test_requests_at_once_get_what_they_get_alone(served: Http) -> None:
    alone = [served.infer("seed", "INT64", [seed]).json() for seed in range(12)]
    with ThreadPoolExecutor(12) as threads:
        together = list(threads.map(lambda seed: served.infer("seed", "INT64", [seed]), range(12)))
    for one, other in zip(alone, together, strict=True):
        wanted = pytest.approx(one["outputs"][0]["data"], abs=1e-4)
        assert other.json()["outputs"][0]["data"] == wanted


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "seed", "datatype": "INT64", "shape": [1], "data": [1], **changes}


MALFORMED: dict[str, Any] = {
    "no inputs": {},
    "null inputs": {"inputs": None},
    "no tensor": {"inputs": [3]},
    "no data": {"inputs": [{"name": "seed", "datatype": "INT64", "shape": [1]}]},
    "unknown input": {"inputs": [tensor(name="sed")]},
    "twice": {"inputs": [tensor(), tensor()]},
    "a shape that lies": {"inputs": [tensor(shape=[2])]},
    "a shape of text": {"inputs": [tensor(shape=["1"])]},
    "a negative shape": {"inputs": [tensor(shape=[-1])]},
    "an unknown type": {"inputs": [tensor(datatype="INT65")]},
    "a type of a list": {"inputs": [tensor(datatype=["INT64"])]},
    "a number that does not fit": {"inputs": [tensor(datatype="INT8", data=[300])]},
    "a bool for a number": {"inputs": [tensor(data=[True])]},
    "a null": {"inputs": [tensor(data=[None])]},
    "a negative seed": {"inputs": [tensor(data=[-1])]},
    "a float for a seed": {"inputs": [tensor(datatype="FP32", data=[1.5])]},
    "no row": {"inputs": [tensor(shape=[0], data=[])]},
    "a scalar": {"inputs": [tensor(shape=[])]},
    "noise of a wrong shape": {"inputs": [tensor(name="noise", datatype="FP32")]},
    "unknown output": {"inputs": [tensor()], "outputs": [{"name": "x"}]},
    "unknown field": {"inputs": [tensor()], "input": 1},
    "unknown parameter": {"inputs": [tensor()], "parameters": {"steps": 1}},
    "k without selection": {"inputs": [tensor()], "parameters": {"k": 1}},
    "unknown selection": {"inputs": [tensor()], "parameters": {"selection": "best"}},
    "a cascade of a flow": {"inputs": [tensor()], "parameters": {"selection": "cascade"}},
    "no steps": {"inputs": [tensor()], "parameters": {"num_steps": 0}},
    "a timeout of text": {"inputs": [tensor()], "parameters": {"timeout": "1"}},
    "a negative timeout": {"inputs": [tensor()], "parameters": {"timeout": -1}},
    "steps as text": {"inputs": [tensor()], "parameters": {"num_steps": "5"}},
    "bytes that are not there": {"inputs": [tensor(parameters={"binary_data_size": 8})]},
    "an id of a number": {"inputs": [tensor()], "id": 3},
    "deep data": {"inputs": [tensor(data=[[[[[[[[[[[1]]]]]]]]]]])]},
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_makes_no_sense_is_400_in_the_form_of_the_protocol(served: Http, what: str) -> None:
    answer = served.post("/v2/models/tiny/infer", MALFORMED[what])
    assert answer.status_code == 400, answer.text
    assert list(answer.json()) == ["error"]
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b"9" * 5000, b'"\\ud800"'],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v2/models/tiny/infer", "/v1/images/generations"])
def test_bodies_that_are_no_object_are_400(served: Http, path: str, raw: bytes) -> None:
    answer = served.post(path, raw[:100_000])
    assert answer.status_code == 400
    assert "error" in answer.json()


def test_limits_are_checked_before_anything_is_allocated(flow: Path) -> None:
    limits = {"rows": 4, "num_steps": 10, "body_bytes": 2048}
    with http(flow, limits=limits) as served:
        huge = served.post("/v2/models/tiny/infer", {"inputs": [tensor(shape=[2**40])]})
        assert (huge.status_code, "limits.rows" in huge.text) == (413, True)
        none = served.post("/v2/models/tiny/infer", {"inputs": [tensor(shape=[0, 2**80], data=[])]})
        assert (none.status_code, "limits.rows" in none.text) == (413, True)
        assert served.infer("seed", "INT64", [1, 2, 3, 4, 5]).status_code == 413
        steps = served.infer("seed", "INT64", [1], parameters={"num_steps": 11})
        assert (steps.status_code, "limits.num_steps" in steps.text) == (400, True)
        images = served.post("/v1/images/generations", {"prompt": "", "n": 5})
        assert (images.status_code, "1 to 4 (limits.rows)" in images.text) == (400, True)
        noise = served.infer("noise", "FP32", [3e38] * 16, shape=[1, *SHAPE])
        assert (noise.status_code, "limits.magnitude is 1e+06" in noise.text) == (400, True)
        body = served.post("/v2/models/tiny/infer", b" " * 3000)
        assert (body.status_code, "limits.body_bytes" in body.text) == (413, True)
        packed = httpx.post(
            served.url + "/v2/models/tiny/infer", content=b"x", headers={"content-encoding": "gzip"}
        )
        assert packed.status_code == 415


def test_errors_have_the_form_of_their_api(served: Http) -> None:
    nothing = served.get("/nothing")
    assert nothing.status_code == 404
    assert nothing.headers["content-type"] == "application/problem+json"
    assert served.post("/status").json()["title"] == "method_not_allowed"
    openai = served.post("/v1/images/generations", {"prompt": "", "n": 11}).json()["error"]
    assert (openai["type"], openai["param"]) == ("invalid_request_error", "n")
    other = served.post("/v1/images/generations", {"prompt": "", "model": "dall-e"})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
    assert served.post("/v1/completions", {"prompt": "a"}).status_code == 400
    late = served.post(
        "/v1/images/generations",
        {"prompt": "", "num_steps": 250, "n": 10},
        **{"x-elastic-timeout-s": "0.001"},
    )
    assert late.status_code == 504
    microseconds = {"num_steps": 250, "timeout": 1000}
    assert served.infer("seed", "INT64", [1], parameters=microseconds).status_code == 504
    wrong = served.get("/status", **{"x-elastic-timeout-s": "soon"})
    assert wrong.status_code == 400
    named = served.get("/v2", **{"x-request-id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"


def test_a_lost_expert_is_told_in_the_headers(served: Http) -> None:
    served.pool.faults[2] = lambda answer: answer * torch.nan
    answer = served.infer("seed", "INT64", [5])
    assert answer.status_code == 200
    assert answer.headers["x-elastic-experts"] == "expert-0,expert-1"
    assert answer.headers["x-elastic-degraded"] == "true"
    assert answer.headers["x-elastic-lost"] == "expert-2"
    states = {one["name"]: one for one in served.post("/v2/repository/index").json()}
    assert states["expert-2"]["state"] == "UNAVAILABLE"
    assert "not finite" in states["expert-2"]["reason"]
    assert states["tiny"]["state"] == "READY"
    ready = served.post("/v2/repository/index", {"ready": True}).json()
    assert {one["name"] for one in ready} == {"tiny", "expert-0", "expert-1"}
    assert served.post("/v2/repository/index", {"ready": 1}).status_code == 400
    for one in ready:  # what the index names is there
        address = f"/v2/models/{one['name']}/versions/{one['version']}"
        assert served.get(address + "/ready").status_code == 200
    metrics = served.get("/metrics").text
    replica = f'replica="{socket.gethostname()}-{os.getpid()}"'
    calls = f'elastic_serve_expert_calls_total{{expert="expert-2",outcome="garbage",{replica}}} 3.0'
    assert calls in metrics
    assert f"elastic_serve_degraded_total{{{replica}}} 1.0" in metrics
    for expert, state in (("expert-0", 0), ("expert-1", 0), ("expert-2", 2)):
        told = f'elastic_serve_expert_state{{expert="{expert}",{replica}}} {state}.0'
        assert told in metrics


def test_experts_are_unloaded_and_loaded(served: Http, flow: Path) -> None:
    assert served.post("/v2/repository/models/expert-1/unload").status_code == 200
    answer = served.infer("seed", "INT64", [5])
    assert answer.headers["x-elastic-lost"] == "expert-1"
    assert served.get("/v2/models/expert-1/ready").status_code == 503
    replica = f'replica="{socket.gethostname()}-{os.getpid()}"'
    told = f'elastic_serve_expert_state{{expert="expert-1",{replica}}} 3.0'
    assert told in served.get("/metrics").text
    with http(flow) as other:  # another replica, and one that starts later
        assert other.infer("seed", "INT64", [5]).headers["x-elastic-lost"] == "expert-1"
        assert served.post("/v2/repository/models/expert-1/load").status_code == 200

        def is_whole() -> bool:
            return "x-elastic-lost" not in other.infer("seed", "INT64", [5]).headers

        wait_until(is_whole, "the other replica has seen it")
    assert served.post("/v2/repository/models/tiny/unload").status_code == 400
    assert served.post("/v2/repository/models/none/load").status_code == 404


def version_of(served: Http) -> str:
    return str(served.get("/status").json()["version"])


def test_swaps_drop_no_request_and_versions_may_be_pinned(served: Http, flow: Path) -> None:
    first = version_of(served)
    before = served.infer("seed", "INT64", [5]).json()["outputs"][0]["data"]
    repository = Repository.open(flow)

    def many(_: int) -> list[int]:
        return [served.infer("seed", "INT64", [5]).status_code for _ in range(20)]

    with ThreadPoolExecutor(2) as threads:
        running = threads.map(many, range(2))
        repository.replace_expert("expert-0", trained("flow", 50).weights)
        wait_until(lambda: version_of(served) != first, "a new expert is served")
        second = version_of(served)
        repository = Repository.open(flow).add_expert(
            "expert-3", trained("flow", 51), router=trained("flow", 52, outputs=4)
        )
        wait_until(lambda: version_of(served) != second, "one more expert is served")
        assert {status for one in running for status in one} == {200}
    after = served.infer("seed", "INT64", [5])
    assert after.headers["x-elastic-experts"] == "expert-0,expert-1,expert-2,expert-3"
    old = served.post(
        f"/v2/models/tiny/versions/{first}/infer", {"inputs": [tensor(data=[5])]}
    ).json()
    assert old["outputs"][0]["data"] == pytest.approx(before, abs=1e-4)
    assert old["model_version"] == first
    unknown = served.post("/v1/images/generations", {"prompt": ""}, **{"x-elastic-version": "no"})
    assert unknown.status_code == 404


def test_a_version_that_does_not_work_is_refused(served: Http, flow: Path) -> None:
    first = version_of(served)
    garbage = {name: one * 1e38 for name, one in trained("flow", 1).weights.items()}
    refused = served.service.metrics.swaps.labels("refused")._value
    Repository.open(flow).replace_expert("expert-1", garbage)
    wait_until(lambda: refused.get() == 1, "it is refused")
    assert version_of(served) == first
    assert served.infer("seed", "INT64", [5]).headers["x-elastic-degraded"] == "false"
    load = "/v2/repository/models/tiny/load"
    told = served.post(load)
    assert (told.status_code, "not finite" in told.json()["error"]) == (400, True)
    Repository.open(flow).replace_expert("expert-1", trained("flow", 1).weights)
    assert served.post(load).status_code == 200
    assert version_of(served) != first


def test_a_canary_takes_over_or_is_taken_back(flow: Path) -> None:
    canary = {"percent": 50, "min_requests": 10, "max_slowdown": 1e9}
    with http(flow, canary=canary) as served:
        first, before = version_of(served), Repository.open(flow)
        before.replace_expert("expert-1", trained("flow", 60).weights)
        status = wait_until(
            lambda: (now := served.get("/status").json())["candidate"] and now, "a trial begins"
        )
        seen = {served.infer("seed", "INT64", [1]).headers["x-elastic-version"] for _ in range(12)}
        assert seen <= {first, status["candidate"]}
        while served.get("/status").json()["candidate"]:
            assert served.infer("seed", "INT64", [1]).status_code == 200
        second = version_of(served)
        assert second == status["candidate"]
        Repository.open(flow).replace_expert("expert-1", trained("flow", 61).weights)
        wait_until(lambda: served.get("/status").json()["candidate"], "another trial begins")
        served.pool.only_new = second
        while served.get("/status").json()["candidate"]:
            served.infer("seed", "INT64", [1])
        status = served.get("/status").json()
        assert status["version"] == second
        assert len(status["rolled_back"]) == 1
        wait_until(lambda: folder_names(flow) == second, "the folder names the old version again")
        Repository.open(flow).replace_selection({"kind": "top_k", "k": 1})
        wait_until(lambda: served.get("/status").json()["candidate"], "a third trial begins")
        served.pool.only_new = None
        assert before.put_back(Repository.open(flow).manifest)
        wait_until(
            lambda: version_of(served) == first, "the first version is back, without a trial"
        )


def folder_names(path: Path) -> str:
    return identity_of(Repository.open(path, verify=False).manifest)


def test_keys_are_needed_where_they_are_set(flow: Path) -> None:
    (user, user_hash), (admin, admin_hash) = new_key(), new_key()
    keys = [
        {"name": "user", "sha256": user_hash, "rate_per_s": 0.001, "burst": 3},
        {"name": "admin", "sha256": admin_hash, "is_admin": True},
    ]
    with http(flow, keys=keys) as served:
        for path in ("/", "/docs", "/v2/health/ready", "/openapi.json"):
            assert served.get(path).status_code == 200
        refused = served.get("/v1/models")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert served.get("/v1/models", authorization=f"Bearer {user}x").status_code == 401
        mine = {"authorization": f"Bearer {user}"}
        assert served.get("/v1/models", **mine).status_code == 200
        assert served.get("/status", **mine).status_code == 200
        load = "/v2/repository/models/expert-1/load"
        assert served.post(load, **mine).status_code == 403
        assert served.get("/status", **mine).status_code == 200
        limited = served.get("/status", **mine)
        assert (limited.status_code, "rate_per_s" in limited.text) == (429, True)
        assert int(limited.headers["retry-after"]) > 100
        assert served.post(load, authorization=f"Bearer {admin}").status_code == 200
        assert user not in served.get("/metrics", authorization=f"Bearer {admin}").text


def test_classes_have_labels_and_many_types_are_read(tmp_path: Path) -> None:
    make_repository(tmp_path / "classes", "classifier", selection={"kind": "top_k", "k": 2})
    with http(tmp_path / "classes") as served:
        wanted = None
        for datatype in ("INT8", "UINT16", "INT64", "FP16", "FP32", "FP64"):
            answer = served.infer("input", datatype, [1] * 16, shape=[1, *SHAPE]).json()
            outputs = {one["name"]: one for one in answer["outputs"]}
            assert outputs["label"]["data"][0] in ("a", "b", "c")
            wanted = wanted or outputs["probabilities"]["data"]
            assert outputs["probabilities"]["data"] == wanted
        yes = served.infer("input", "BOOL", [True] * 16, shape=[1, *SHAPE]).json()
        assert yes["outputs"][0]["data"] == wanted
        nested = np.ones((1, *SHAPE)).tolist()
        again = served.infer("input", "FP32", nested, shape=[1, *SHAPE]).json()
        assert again["outputs"][0]["data"] == wanted
        cascade = {"selection": "cascade", "low": 0.0, "high": 1.0}
        both = served.infer("input", "FP32", nested, shape=[1, *SHAPE], parameters=cascade)
        assert len(both.headers["x-elastic-experts"].split(",")) == 2


def test_texts_are_completed_at_once_and_as_a_stream(tmp_path: Path) -> None:
    make_repository(tmp_path / "text", "language")
    with http(tmp_path / "text") as served:
        asked = {"prompt": "hé", "max_tokens": 20, "temperature": 0.5, "seed": 3}
        whole = served.post("/v1/completions", asked).json()
        assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 20, "total_tokens": 23}
        assert whole["choices"][0]["finish_reason"] == "length"
        stream = served.post("/v1/completions", {**asked, "stream": True})
        assert stream.headers["content-type"].startswith("text/event-stream")
        *events, done, end = stream.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        told = [json.loads(event.removeprefix("data: ")) for event in events]
        words = "".join(one["choices"][0]["text"] for one in told)
        assert words == whole["choices"][0]["text"]
        counted = {**asked, "stream": True, "stream_options": {"include_usage": True}}
        *_, last, _, _ = served.post("/v1/completions", counted).text.split("\n\n")
        usage = json.loads(last.removeprefix("data: "))
        assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
        alone = served.post("/v1/completions", {**counted, "stream": False})
        assert alone.json()["error"]["param"] == "stream_options"
        probabilities = served.infer("text", "BYTES", ["ab", ""]).json()["outputs"][0]
        assert probabilities["shape"] == [2, 256]
        assert sum(probabilities["data"]) == pytest.approx(2)
        tokens = served.infer("tokens", "UINT8", [97, 98], shape=[1, 2]).json()["outputs"][0]
        assert tokens["data"] == pytest.approx(probabilities["data"][:256])


def test_every_address_is_described(served: Http) -> None:
    assert served.get("/openapi.json").json() == describe()
