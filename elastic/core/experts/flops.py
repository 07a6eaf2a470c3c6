"""How many floating-point operations a call takes: of matrix products, counted, not estimated.

A multiplication and an addition are two. What is elementwise is not counted, as is usual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_flops(module: nn.Module, *inputs: Any) -> int:
    """The operations of `module(*inputs)`, forward only; a training step takes three times that.

    The backward pass takes two: one product for the gradient of each operand (Kaplan et al.,
    arXiv 2001.08361, section 2.1).
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops())
