"""The marks of tests that need hosts of their own, in network namespaces."""

from __future__ import annotations

import pytest

from scripts.hosts import why_impossible


def on_hosts(timeout_s: int) -> list[pytest.MarkDecorator]:
    """For `pytestmark`. Left out, and why is said, where this machine can have no such hosts."""
    reason = why_impossible()
    skip = pytest.mark.skipif(bool(reason), reason=reason)
    return [pytest.mark.ray, skip, pytest.mark.timeout(timeout_s)]
