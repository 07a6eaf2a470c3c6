"""Whether the workers of a job fit into this machine's memory, before any of them starts."""

from __future__ import annotations

from pathlib import Path

from elastic.core.errors import TaskError
from elastic.core.layout import Layout

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def check_memory(
    layout: Layout, num_workers: int, *, meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP
) -> None:
    """Refuse a model whose gradients alone leave no room for as many workers.

    A worker holds its own gradients and float buffers; the parameters are shared. Activations come
    on top and are not known here.

    Raises:
        TaskError: with the need, what is available, and the settings that change the need.
    """
    one_bytes = 4 * layout.num_elements
    need_bytes, free_bytes = num_workers * one_bytes, available_bytes(meminfo, cgroup)
    if need_bytes > free_bytes:
        raise TaskError(
            f"the gradients of {num_workers} workers need {need_bytes / 2**20:.0f} MiB"
            f" ({one_bytes / 2**20:.0f} MiB each) and {free_bytes / 2**20:.0f} MiB of memory are"
            " available: lower workers.start, or train a smaller model; a model must fit into one"
            " worker"
        )


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """What the kernel and the control group of this process would still give."""
    words = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(words["MemAvailable"].split()[0]) * 1024
    limit, current = cgroup / "memory.max", cgroup / "memory.current"
    if limit.exists() and current.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(current.read_text()))
    return available
