"""What the bits of a run depend on besides the job file: processor, kernels, versions, threads.

And the hash by which two runs are compared. It reads, and never sets, the environment.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from elastic.core.layout import Layout

# Variables that cap the instructions kernels may use, so that machines can be made alike.
CAP_VARIABLES = ("MKL_CBWR", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")

_SENTENCES = {
    "cpu_model": "the processor",
    "cpu_capability": "the instruction set torch uses",
    "device": "the accelerator",
    "threads": "the number of threads per worker",
    **{name: f"the variable {name}" for name in CAP_VARIABLES},
}


def fingerprint(threads: int, device: str = "cpu") -> dict[str, str | int]:
    """Describe this process. `threads` and `device` are what each worker computes with.

    Equal fingerprints promise equal bits; others may still give them. A variable that is not set
    is the empty string.
    """
    accelerator: dict[str, str | int] = {}
    if device == "cuda":
        accelerator = {
            "device": torch.cuda.get_device_name(),
            "cuda": str(torch.version.cuda),
            "cudnn": torch.backends.cudnn.version() or "",  # type: ignore[no-untyped-call]
        }
    return {
        **accelerator,
        "cpu_model": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{name: os.environ.get(name, "") for name in CAP_VARIABLES},
        "threads": threads,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def differences(a: Mapping[str, str | int], b: Mapping[str, str | int]) -> list[str]:
    """One sentence for each thing in which `b`, now, differs from `a`, then. Empty if none."""
    sentences = []
    for key in dict.fromkeys((*a, *b)):
        old, new = a.get(key, ""), b.get(key, "")
        if old != new:
            subject = _SENTENCES.get(key, f"the version of {key}")
            sentences.append(f"{subject} was {_shown(old)} and is {_shown(new)}")
    return sentences


def _shown(value: str | int) -> str:
    return "not set" if value == "" else str(value)


def parameters_sha256(layout: Layout, values: torch.Tensor) -> str:
    """Hash the parameters' bytes in layout order, without padding and without buffers.

    Args:
        values: float32 of shape (layout.num_elements,), contiguous.
    """
    flat = values.detach().numpy()
    digest = hashlib.sha256()
    for field in layout.parameters:
        digest.update(flat[field.start : field.stop].data)
    return digest.hexdigest()
