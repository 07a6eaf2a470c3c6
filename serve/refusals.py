"""What a client is told when it gets no answer: one class, with a status, a code and words.

Every handler raises these and nothing else; the HTTP layer gives them the form of the API that was
asked. Messages name the value seen, the limit and the setting. Never holds a secret.
"""

from __future__ import annotations

from elastic.core.errors import ElasticError


class Refusal(ElasticError):
    """A request that is not answered. `code`: a word that programs may compare."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str = "invalid_value",
        retry_after_s: float | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message, status, code, retry_after_s, param)
        self.message, self.status, self.code = message, status, code
        self.retry_after_s, self.param = retry_after_s, param

    def __str__(self) -> str:
        return self.message


def bad(message: str, param: str | None = None) -> Refusal:
    """The request makes no sense."""
    return Refusal(message, 400, "invalid_value", None, param)


def unknown(message: str) -> Refusal:
    """There is no such model, version or address."""
    return Refusal(message, 404, "not_found")


def unauthorized(message: str) -> Refusal:
    return Refusal(message, 401, "invalid_api_key")


def too_large(message: str, param: str | None = None) -> Refusal:
    return Refusal(message, 413, "too_large", None, param)


def too_many(message: str, retry_after_s: float) -> Refusal:
    """A rate or a queue is at its limit."""
    return Refusal(message, 429, "rate_limit_exceeded", retry_after_s)


def unavailable(message: str, retry_after_s: float = 1.0) -> Refusal:
    """Nothing can answer now."""
    return Refusal(message, 503, "unavailable", retry_after_s)


def too_late(message: str) -> Refusal:
    """The deadline has passed."""
    return Refusal(message, 504, "deadline_exceeded")


def failed(message: str) -> Refusal:
    """A bug of ours."""
    return Refusal(message, 500, "internal_error")
