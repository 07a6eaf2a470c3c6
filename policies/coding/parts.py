"""How a global batch is cut into parts: each a fixed range of whole micro-batches.

Every scheme needs the number of micro-batches to be a multiple of some number; which one, it says.
"""

from __future__ import annotations


def micro_batches_of(part: int, num_parts: int, num_micro_batches: int) -> range:
    """The micro-batches of a part, all parts being equal."""
    size = num_micro_batches // num_parts
    return range(part * size, (part + 1) * size)


def check_micro_batches(num_micro_batches: int, multiple: int, scheme: str) -> None:
    """Refuse a number of micro-batches that cannot be cut into parts.

    Raises:
        ValueError: it is no multiple of `multiple`; names the nearest one.
    """
    if num_micro_batches > 0 and num_micro_batches % multiple == 0:
        return
    nearest = max(1, (2 * num_micro_batches + multiple) // (2 * multiple)) * multiple
    raise ValueError(
        f"batch.micro_batches is {num_micro_batches}: {scheme} needs a multiple of {multiple}, "
        f"the nearest is {nearest}"
    )
