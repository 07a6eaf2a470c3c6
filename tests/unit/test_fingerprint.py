"""Fingerprints name what differs; the hash covers parameters and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from elastic.core import fingerprint as module
from elastic.core.fingerprint import differences, fingerprint, parameters_sha256
from elastic.core.layout import make_layout


def test_a_fingerprint_names_machine_kernels_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    found = fingerprint(3)
    assert (found["threads"], found["MKL_CBWR"], found["ATEN_CPU_CAPABILITY"]) == (3, "AVX2", "")
    assert found["torch"] == torch.__version__
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert all(type(value) in (str, int) for value in found.values())
    assert differences(found, fingerprint(3)) == []


def test_differences_are_sentences() -> None:
    old = {"cpu_model": "A", "threads": 1, "MKL_CBWR": "", "torch": "2.12", "numpy": "2"}
    new = {"cpu_model": "A", "threads": 2, "MKL_CBWR": "AVX2", "torch": "2.13", "numpy": "2"}
    assert differences(old, new) == [
        "the number of threads per worker was 1 and is 2",
        "the variable MKL_CBWR was not set and is AVX2",
        "the version of torch was 2.12 and is 2.13",
    ]


def test_the_processor_is_read_or_guessed(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel\t: 7\nmodel name\t: Some CPU: fast\n")
    assert module._cpu_model(cpuinfo) == "Some CPU: fast"
    assert module._cpu_model(tmp_path / "missing")


def test_the_hash_covers_parameters_without_padding_or_buffers() -> None:
    layout = make_layout(
        [[("a", (3, 3)), ("b", (20,))], [("c", ())]], buffers=[("mean", (4,))], chunk_elements=16
    )
    values = torch.randn(layout.num_elements)
    a, b, c = (values[field.start : field.stop] for field in layout.parameters)
    expected = hashlib.sha256(torch.cat([a, b, c]).numpy().tobytes()).hexdigest()
    assert parameters_sha256(layout, values) == expected
    values[layout.parameters[0].stop] += 1  # padding
    values[layout.buffers[0].start] += 1
    assert parameters_sha256(layout, values) == expected
    values[layout.parameters[2].start] += 1
    assert parameters_sha256(layout, values) != expected
