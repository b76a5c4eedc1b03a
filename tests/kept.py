"""Answers and gradients of a model where less is kept for the backward, beside torch's."""

from contextlib import nullcontext

import torch

from testtime.adaptation.kernels.lean import Lean


def answer_and_gradients(model, x, learnt, context):
    with context:
        z = model(x)
    wanted = learnt or [x]
    return z.detach(), torch.autograd.grad(z.float().square().sum(), wanted, allow_unused=True)


def assert_same(model, x, learnt=()):
    z, grads = answer_and_gradients(model, x, list(learnt), nullcontext())
    lean_z, lean_grads = answer_and_gradients(model, x, list(learnt), Lean(least=1))
    assert torch.equal(z, lean_z)
    assert all(g is h is None or torch.equal(g, h) for g, h in zip(grads, lean_grads, strict=True))
    assert any(g is not None and g.abs().sum() > 0 for g in grads)
