"""Fixtures of the tests on hosts in network namespaces."""

from tests.integration.fixtures import _nothing_is_left

__all__ = ["_nothing_is_left"]
