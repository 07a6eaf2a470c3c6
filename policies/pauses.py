"""How long to wait before something that failed is tried again. Pure."""

from __future__ import annotations

_MOST_DOUBLINGS = 64  # 2.0 ** 1024 is no float


def pause_s(num_before: int, *, base_s: float, cap_s: float) -> float:
    """Twice as long after each pause, from `base_s` up to `cap_s`."""
    return min(cap_s, base_s * 2.0 ** min(num_before, _MOST_DOUBLINGS))
