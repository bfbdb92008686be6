"""SplitCrossEntropy under torch.func and forward mode, against plain torch."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from imbsam_fast import ClassSplit, SplitCrossEntropy, split_loss

WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)


def criteria() -> list:
    split = ClassSplit.from_counts([500, 300, 40, 10])
    plain = functools.partial(F.cross_entropy, weight=WEIGHT, label_smoothing=0.1, reduction="none")
    return [
        SplitCrossEntropy(split, weight=WEIGHT, label_smoothing=0.1, tail_weight=2.0),
        split_loss(plain, split, tail_weight=2.0),
    ]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, tangent = (torch.randn(8, 4, generator=generator).double() for _ in range(2))
    targets = torch.arange(8) % 4
    targets[3] = -100
    return logits, tangent, targets


def dual(f, z, v) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(z, v))).tangent


TRANSFORMS = {
    "grad": lambda f, z, v: grad(f)(z),
    "jacrev": lambda f, z, v: jacrev(f)(z),
    "jacfwd": lambda f, z, v: jacfwd(f)(z),
    "hessian": lambda f, z, v: hessian(f)(z),
    "jvp": lambda f, z, v: jvp(f, (z,), (v,))[1],
    "vjp": lambda f, z, v: vjp(f, z)[1](torch.tensor(2.0).double())[0],
    "Hessian times vector": lambda f, z, v: jvp(grad(f), (z,), (v,))[1],
    "linearize": lambda f, z, v: linearize(f, z)[1](v),
    "forward mode": dual,
}


@pytest.mark.parametrize("part", ["head", "tail", "total"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_are_those_of_plain_torch(transform, part):
    z, v, y = batch()
    fused, plain = (transform(lambda z, c=c: getattr(c(z, y), part), z, v) for c in criteria())
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-14)
    assert plain.abs().max() > 0


def test_per_sample_gradients():
    z, _, y = batch()
    fused, plain = (
        vmap(grad(lambda z, y, c=c: c(z[None], y[None]).total))(z, y) for c in criteria()
    )
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-14)


def test_an_ordinary_backward_after_a_transform():
    """What was converted inside a transform must not outlive it."""
    z, _, y = batch()
    fused, plain = criteria()
    grad(lambda z: fused(z, y).total)(z)
    for c in (fused, plain):
        z.grad = None
        c(z.requires_grad_(), y).total.backward()
        kept = z.grad if c is fused else kept  # noqa: F821
    torch.testing.assert_close(kept, z.grad, rtol=1e-12, atol=1e-14)


def test_a_second_backward_says_what_to_take():
    z, _, y = batch()
    first = torch.autograd.grad(criteria()[0](z.requires_grad_(), y).total, z, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="split_loss"):
        first.sum().backward()
