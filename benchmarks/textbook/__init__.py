"""The thing to beat: each method as one would write it down first, and two floors.

Each is made with a model, its options, and source data where the method needs some, and gives a
function of a batch. Whole models are copied, all is done with `torch.optim` and `backward()`, copies
for a reset are kept, views and teachers are forwarded one by one, images changed with torchvision.
None of it comes from testtime. That they are the same methods is what `tests/bench/test_textbook.py`
holds them to.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from textbook import (
    episodic,
    features,
    knowledge,
    memories,
    normalisation,
    policies,
    prompts,
    teachers,
)
from textbook.parts import Step, configured, entropy


def plain(model: nn.Module) -> Step:
    """Inference: the floor of every method."""

    @torch.no_grad()
    def step(x: Tensor) -> Tensor:
        return model(x)

    return step


def minimal(model: nn.Module) -> Step:
    """A forward, and the backward that reaches only what adapts: the floor of Tent."""
    model, learnt = configured(model)

    def step(x: Tensor) -> Tensor:
        z = model(x)
        torch.autograd.grad(entropy(z).mean(), learnt)
        return z.detach()

    return step


TEXTBOOK: dict[str, Callable[..., Step]] = {
    "bn-adapt": normalisation.bn_adapt,
    "tent": normalisation.tent,
    "eta": normalisation.eta,
    "eata": normalisation.eta,
    "rdumb": normalisation.rdumb,
    "sar": normalisation.sar,
    "deyo": normalisation.deyo,
    "ostta": normalisation.ostta,
    "lerm": normalisation.lerm,
    "roid": normalisation.roid,
    "cotta": teachers.cotta,
    "rmt": teachers.rmt,
    "psmt": teachers.psmt,
    "petal": teachers.petal,
    "vcotta": teachers.vcotta,
    "rotta": memories.rotta,
    "stamp": memories.stamp,
    "lame": features.lame,
    "cafa": features.cafa,
    "adanpc": features.adanpc,
    "memo": episodic.memo,
    "domainadaptor": episodic.domainadaptor,
    "dent": episodic.dent,
    "tesla": policies.tesla,
    "sade": knowledge.sade,
    "sqrl": knowledge.sqrl,
    "simatta": knowledge.simatta,
    "foa": prompts.foa,
}
"""Method -> what makes its textbook form of (model, source data where it needs some, options)."""
