"""The modules that are shipped: shapes, what they may not see, their cost, mistakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from elastic.core.errors import ConfigError
from elastic.core.experts.classifier import Classifier
from elastic.core.experts.dit import DiT, DiTRouter, _from_patches, _to_patches
from elastic.core.experts.flops import count_flops
from elastic.core.experts.language import ByteLM, ByteRouter


def stirred(module: nn.Module) -> nn.Module:
    """All weights random, those that begin at 0 too."""
    generator = torch.Generator().manual_seed(4)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return module.eval()


def test_patches_are_put_back_where_they_were() -> None:
    x = torch.randn(2, 3, 4, 6)
    patches = _to_patches(x, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[0, 1].view(3, 2, 2), x[0, :, :2, 2:4])
    assert torch.equal(_from_patches(patches, 2, x.shape), x)


def test_a_velocity_depends_on_every_pixel_and_on_the_time() -> None:
    model = stirred(DiT([1, 8, 8], width=16, depth=1, heads=2))
    x, t = torch.randn(3, 1, 8, 8, requires_grad=True), torch.rand(3, requires_grad=True)
    answer = model(x, t)
    assert answer.shape == x.shape
    by_x, by_t = torch.autograd.grad(answer[1].sum(), (x, t))
    assert (by_x[1] != 0).all()
    assert by_t[1] != 0
    assert (by_x[0] == 0).all(), "samples of a batch must not see each other"


@pytest.mark.parametrize(
    ("router", "inputs"),
    [
        (DiTRouter([1, 4, 4], 5), (torch.randn(3, 1, 4, 4), torch.rand(3))),
        (ByteRouter(16, 5), (torch.randint(256, (3, 9)),)),
        (Classifier([2, 3], 5), (torch.randn(3, 2, 3),)),
    ],
    ids=["flow", "language", "classifier"],
)
def test_a_router_gives_a_logit_for_each_expert(
    router: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> None:
    logits_BK = stirred(router)(*inputs)
    assert logits_BK.shape == (3, 5)
    alone = router(*(one[1:2] for one in inputs))
    torch.testing.assert_close(alone, logits_BK[1:2])


def test_a_language_model_sees_no_byte_that_comes_later() -> None:
    model, tokens = stirred(ByteLM(12, width=16, depth=2, heads=2)), torch.randint(256, (2, 12))
    logits = model(tokens)
    assert logits.shape == (2, 12, 256)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 256
    later = model(changed)
    torch.testing.assert_close(later[:, :7], logits[:, :7])
    assert not torch.allclose(later[:, 7:], logits[:, 7:])


def test_a_router_of_text_gives_each_prefix_what_it_gives_alone() -> None:
    router, tokens = stirred(ByteRouter(12, 3)), torch.randint(256, (2, 12))
    prefixes = router.prefixes(tokens)  # type: ignore[operator]
    for num in (1, 5, 12):
        torch.testing.assert_close(prefixes[:, num - 1], router(tokens[:, :num]))


def test_operations_are_those_of_the_matrices() -> None:
    assert count_flops(Classifier([6], 5, width=8, depth=2), torch.zeros(3, 6)) == 2 * 3 * (
        6 * 8 + 2 * 8 * 8 + 8 * 5
    )
    width, places = 16, 16
    per_place = 12 * width * width + 2 * 4 * width  # attention, widening; into and out of patches
    once = 6 * width * width + width * width + 64 * width  # the time
    looking = 2 * places * places * width  # query by key, then by value
    counted = count_flops(
        DiT([1, 8, 8], width=width, depth=1, heads=2), torch.zeros(1, 1, 8, 8), torch.zeros(1)
    )
    assert counted == 2 * (places * per_place + once + looking)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DiT([8, 8]), r"shape is \(8, 8\)"),
        (lambda: DiT([1, 8, 7]), r"\(1, 8, 7\), patch is 2"),
        (lambda: DiT([1, 8, 8], width=10), "width is 10, heads is 4"),
        (
            lambda: ByteLM(4)(torch.zeros(1, 5, dtype=torch.int64)),
            "5 bytes; the model needs 1 to 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
