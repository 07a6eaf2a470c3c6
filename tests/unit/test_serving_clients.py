"""Clients that others wrote work unmodified: OpenAI's, Triton's; and schemathesis finds no 500."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serve.app import describe
from tests.served import SHAPE, Http, http, make_repository

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Http]:
    path = tmp_path_factory.mktemp("flow") / "flow"
    make_repository(path)
    with http(path, limits={"num_steps": 8, "rows": 8}) as running:
        yield running


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Http]:
    path = tmp_path_factory.mktemp("text") / "text"
    make_repository(path, "language")
    with http(path) as running:
        yield running


def test_openai_makes_pictures_and_lists_models(served: Http) -> None:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        assert next(iter(client.models.list())).id == "tiny"
        assert client.models.retrieve("expert-1").owned_by == "elastic"
        made = client.images.generate(
            prompt="a digit", model="tiny", n=2, response_format="b64_json", size="256x256"
        )
        assert made.data is not None
        assert [one.b64_json is not None for one in made.data] == [True, True]
        with pytest.raises(openai.BadRequestError, match="needs WxH") as error:
            client.images.generate(prompt="a digit", size="9x99999")  # type: ignore[call-overload]
        assert error.value.param == "size"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("none")


def test_openai_completes_and_streams(text: Http) -> None:
    with openai.OpenAI(base_url=text.url + "/v1", api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "tiny", "prompt": "def ", "max_tokens": 30, "seed": 1}
        whole = client.completions.create(**asked)
        stream = client.completions.create(**asked, stream=True)
        assert "".join(part.choices[0].text for part in stream) == whole.choices[0].text
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 30


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_triton_s_client_infers(served: Http, binary: bool) -> None:
    triton = pytest.importorskip("tritonclient.http")
    with triton.InferenceServerClient(served.url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tiny")
        assert client.get_server_metadata()["name"] == "elastic"
        about = client.get_model_metadata("tiny")
        assert about["outputs"][0] == {"name": "sample", "datatype": "FP32", "shape": [-1, *SHAPE]}
        assert {one["name"] for one in client.get_model_repository_index()} > {"tiny", "expert-2"}
        seed = triton.InferInput("seed", [2], "INT64")
        seed.set_data_from_numpy(np.array([5, 6]), binary_data=binary)
        wanted = [triton.InferRequestedOutput("sample", binary_data=binary)]
        answer = client.infer("tiny", [seed], outputs=wanted, request_id="42")
        sample = answer.as_numpy("sample")
        assert sample.shape == (2, *SHAPE)
        noise = triton.InferInput("noise", [1, *SHAPE], "FP16")
        noise.set_data_from_numpy(np.zeros((1, *SHAPE), np.float16), binary_data=True)
        assert client.infer("tiny", [noise]).as_numpy("sample").shape == (1, *SHAPE)
        with pytest.raises(triton.InferenceServerException, match="no model"):
            client.infer("none", [seed])
        client.unload_model("expert-1")
        assert not client.is_model_ready("expert-1")
        client.load_model("expert-1")
        assert client.is_model_ready("expert-1")


SCHEMA = schemathesis.openapi.from_dict(describe())
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]


@SCHEMA.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_the_document_says_is_so(case: Any, served: Http) -> None:
    response = case.call(base_url=served.url)
    assert response.status_code != 500, response.text
    case.validate_response(response, checks=CHECKS)


def mutated(generator: random.Random, body: bytes) -> bytes:
    """A request that is wrong in one of many ways, or by chance still right."""
    way = generator.randrange(6)
    place = generator.randrange(len(body))
    if way == 0:
        return body[:place]
    if way == 1:
        return body[:place] + bytes(generator.randrange(256) for _ in range(4)) + body[place:]
    values = [None, True, -1, 0, 2**70, 1e400, "", "\ud800", [], {}, [[]], "x" * 500]
    whole = json.loads(body)
    target: Any = whole
    while isinstance(target, dict | list) and target:
        key: Any = (
            generator.choice(list(target))
            if isinstance(target, dict)
            else generator.randrange(len(target))
        )
        if generator.random() < 0.4 or not isinstance(target[key], dict | list):
            target[key] = generator.choice(values)
            break
        target = target[key]
    return json.dumps(whole).encode()


BODIES = {
    "/v2/models/tiny/infer": {
        "id": "a",
        "parameters": {"num_steps": 2, "selection": "top_k", "k": 1},
        "inputs": [{"name": "seed", "datatype": "INT64", "shape": [2], "data": [1, 2]}],
        "outputs": [{"name": "sample", "parameters": {"binary_data": False}}],
    },
    "/v2/models/tiny/versions/x/infer": {"inputs": []},
    "/v1/images/generations": {
        "prompt": "a",
        "n": 1,
        "size": "8x8",
        "seed": 1,
        "num_steps": 2,
        "selection": {"kind": "mass", "threshold": 0.5, "at_most": 2},
    },
}


NUM_MALFORMED = int(os.environ.get("NUM_MALFORMED", "600"))


def test_malformed_requests_get_typed_errors_only(served: Http) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    with httpx.Client(base_url=served.url, timeout=20) as client:
        for _ in range(NUM_MALFORMED):
            path = generator.choice(list(BODIES))
            body = mutated(generator, json.dumps(BODIES[path]).encode())
            headers = {}
            if generator.random() < 0.2:
                headers["inference-header-content-length"] = str(generator.randrange(-1, 400))
            answer = client.post(path, content=body, headers=headers)
            assert answer.status_code in (200, 400, 404, 413), (body, answer.text)
            if answer.status_code != 200:
                assert answer.json()["error"], body
    assert served.get("/v2/health/ready").status_code == 200
