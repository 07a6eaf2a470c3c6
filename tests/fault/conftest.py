"""Fixtures of the tests on real processes."""

from tests.integration.fixtures import _nothing_is_left, cluster, undisturbed

__all__ = ["_nothing_is_left", "cluster", "undisturbed"]
