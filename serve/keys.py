"""Who may ask, and how often: API keys by their hash, a token bucket for each.

Keys are random and long, so one SHA-256 hides them; comparison takes the same time whichever key
was nearly right. Never logs or keeps a key.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Sequence

from serve.refusals import too_many, unauthorized
from serve.settings import Key

_PREFIX = "el-"


def new_key() -> tuple[str, str]:
    """A fresh key and its hash."""
    key = _PREFIX + secrets.token_urlsafe(32)
    return key, hash_of(key)


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Bucket:
    """So many requests at once, refilled at a rate. Time is passed in, in seconds."""

    def __init__(self, rate_per_s: float, burst: float, now_s: float) -> None:
        self._rate_per_s, self._burst = rate_per_s, burst
        self._tokens, self._last_s = float(burst), now_s

    def take(self, now_s: float) -> float:
        """0 when a request may pass, otherwise how many seconds it should wait."""
        passed_s = max(now_s - self._last_s, 0.0)
        self._tokens = min(self._burst, self._tokens + passed_s * self._rate_per_s)
        self._last_s = now_s
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._rate_per_s


class Gate:
    """Lets a request pass, or raises why not. One of `num_gates`, which requests meet by chance:
    each lets its share of a key's rate pass."""

    def __init__(self, keys: Sequence[Key], clock: Callable[[], float], num_gates: int = 1) -> None:
        self._keys, self._clock = tuple(keys), clock
        self._buckets = {
            one.name: Bucket(one.rate_per_s / num_gates, max(one.burst / num_gates, 1), clock())
            for one in keys
        }

    def check(self, authorization: str | None, *, admin: bool = False) -> str | None:
        """The name of the key, None where no keys are set. `authorization`: 'Bearer KEY'.

        Raises Refusal: 401 without a known key, 403 without the right, 429 beyond its rate.
        """
        if not self._keys:
            return None
        key = self._known(authorization)
        if admin and not key.is_admin:
            refusal = unauthorized(f"key {key.name}: is_admin is not set, which this needs")
            refusal.status, refusal.code = 403, "forbidden"
            raise refusal
        wait_s = self._buckets[key.name].take(self._clock())
        if wait_s > 0:
            limit = f"keys.{key.name}.rate_per_s {key.rate_per_s:g}, burst {key.burst}"
            raise too_many(f"key {key.name}: more requests than its limit ({limit})", wait_s)
        return key.name

    def _known(self, authorization: str | None) -> Key:
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise unauthorized("no API key: needs the header 'Authorization: Bearer KEY'")
        digest = hash_of(given.strip())
        found = None
        for one in self._keys:  # all of them, whichever matches
            if hmac.compare_digest(one.sha256, digest):
                found = one
        if found is None:
            raise unauthorized("the API key is not known here")
        return found
