"""How many floating-point operations a call takes: of matrix products, counted, not estimated.

A multiplication and an addition are two. What is elementwise is not counted, as is usual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_ATTENTION_OF_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def count_flops(module: nn.Module, *inputs: Any) -> int:
    """The operations of `module(*inputs)`, forward only; a training step takes three times that.

    The backward pass takes two: one product for the gradient of each operand (Kaplan et al.,
    arXiv 2001.08361, section 2.1).
    """
    counter = FlopCounterMode(display=False, custom_mapping={_ATTENTION_OF_CPU: _attention})
    with torch.no_grad(), counter:
        module(*inputs)
    return int(counter.get_total_flops())


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """PyTorch 2.13 counts the kernels of GPUs, and not this one."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
