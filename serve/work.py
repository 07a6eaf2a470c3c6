"""A row on its way: what it asks next of the router and the experts, and what it makes of it.

One class per task. Rows of different requests, at different steps, share calls; a row sees only its
own numbers, and its randomness is its own. Never asks an expert itself.

Letters: V outcomes (classes, bytes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from elastic.core.experts.flow import sampling_times

_COLDEST = 1e-6
"""Of temperatures above 0; smaller ones would overflow, and draw the same byte."""


class Work(Protocol):
    """One row."""

    @property
    def is_done(self) -> bool: ...

    def inputs(self) -> tuple[Tensor, ...]:
        """What router and experts get, without the batch dimension."""
        ...

    def take(self, answer: Tensor) -> None:
        """What they answered together."""
        ...


class Denoising:
    """A sample of a flow: from noise at t=1 to data at t=0 by Euler steps of equal length."""

    def __init__(self, noise: Tensor, num_steps: int) -> None:
        self.x, self._step = noise, 0
        self._times = sampling_times(num_steps)

    @property
    def is_done(self) -> bool:
        return self._step == len(self._times) - 1

    def inputs(self) -> tuple[Tensor, ...]:
        return self.x, self._times[self._step]

    def take(self, answer: Tensor) -> None:
        length = self._times[self._step] - self._times[self._step + 1]
        self.x = self.x - length * answer
        self._step += 1


def noise_of(seed: int, shape: Sequence[int]) -> Tensor:
    """The noise that a sample starts from, from a generator of its own."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


class Predicting:
    """Probabilities (V,) for one input: of a class, or of the byte after a text."""

    def __init__(self, given: Tensor) -> None:
        self._given = given
        self.probabilities: Tensor | None = None

    @property
    def is_done(self) -> bool:
        return self.probabilities is not None

    def inputs(self) -> tuple[Tensor, ...]:
        return (self._given,)

    def take(self, answer: Tensor) -> None:
        self.probabilities = answer


class Completing:
    """Bytes after a prompt, one by one, each drawn from the experts' probabilities.

    The text ends before the first stop word, as OpenAI's API has it.
    """

    def __init__(
        self,
        prompt: bytes,
        context: int,
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        stop: Sequence[bytes] = (),
        on_byte: Callable[[int], None] | None = None,
    ) -> None:
        self.text = bytearray()
        self.finish_reason: str | None = "length" if max_tokens == 0 else None
        self._tokens, self._context = bytearray(prompt or b"\n"), context
        self._max_tokens, self._temperature, self._top_p = max_tokens, temperature, top_p
        self._generator = np.random.default_rng(seed)
        self._stop = [one for one in stop if one]
        self._on_byte, self._num_told = on_byte, 0

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None

    def inputs(self) -> tuple[Tensor, ...]:
        return (torch.tensor(list(self._tokens[-self._context :]), dtype=torch.int64),)

    def take(self, answer: Tensor) -> None:
        token = self._draw(answer.double().numpy())
        self._tokens.append(token)
        self.text.append(token)
        ending = next((one for one in self._stop if self.text.endswith(one)), b"")
        if ending:
            del self.text[-len(ending) :]
            self.finish_reason = "stop"
        elif len(self.text) == self._max_tokens:
            self.finish_reason = "length"
        self._tell()

    def _tell(self) -> None:
        """Hand out the bytes that are no part of a stop word, nor may become one."""
        if self._on_byte is None:
            return
        end = len(self.text) - (0 if self.is_done else self._num_held())
        for token in self.text[self._num_told : end]:
            self._on_byte(token)
        self._num_told = end

    def _num_held(self) -> int:
        """Bytes at the end with which a stop word begins."""
        begun = (
            num for one in self._stop for num in range(1, len(one)) if self.text.endswith(one[:num])
        )
        return max(begun, default=0)

    def _draw(self, probabilities_V: np.ndarray) -> int:
        if self._temperature == 0:
            return int(probabilities_V.argmax())
        logs = np.log(np.maximum(probabilities_V, 1e-30))
        heat_V = np.exp((logs - logs.max()) / max(self._temperature, _COLDEST))
        heat_V /= heat_V.sum()
        order_V = np.argsort(-heat_V, kind="stable")
        before_V = np.cumsum(heat_V[order_V]) - heat_V[order_V]
        heat_V[order_V[1:][before_V[1:] >= self._top_p]] = 0  # the first one always stays
        return int(self._generator.choice(len(heat_V), p=heat_V / heat_V.sum()))
