"""Changed copies that share a forward are answered as if each came alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import testtime as tt
from models import batches, tiny, tiny_vit
from testtime.adaptation import shortcuts
from testtime.adaptation.kernels.batch_statistics import InGroups

OPTIONS = {"cotta": {"views": 5, "threshold": 1.0}, "vcotta": {"views": 5}, "stamp": {"views": 5}}


def run(
    model: nn.Module, joined: int, name: str
) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor], int]:
    forwards = []
    hook = model.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shortcuts, "JOINED", {"cpu": joined})
        adapter = tt.adapt(model, name, **OPTIONS[name])
        answers = [adapter(x.double()) for x in batches(3)]
    hook.remove()
    state = adapter.snapshot()
    return answers, state.tensors, state.teacher or {}, len(forwards)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["batch", "sync", "group", "frozen", "vit"])
def test_copies_are_answered_as_if_they_came_alone(kind, name):
    model = (tiny_vit() if kind == "vit" else tiny(kind)).double()
    if kind != "vit":
        model.conv2.bias = None  # its gradient is rounding noise, of which Adam makes steps
    size = batches(1)[0].numel()
    expected, tensors, teacher, forwards = run(model, 0, name)
    for joined in (2 * size, 100 * size):
        answers, moved, own, fewer = run(model, joined, name)
        for mine, theirs in zip(answers, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
        for now, then in ((moved, tensors), (own, teacher)):
            torch.testing.assert_close(now, then, rtol=1e-6, atol=1e-8)
        assert (fewer < forwards) == (kind not in ("sync", "frozen"))


def test_on_a_cpu_copies_come_alone():
    # joined, products round otherwise: ten steps of Adam on a ResNet-18 make 1e-2 of it
    forwards = []
    model = tiny()
    model.register_forward_hook(lambda *_: forwards.append(1))
    adapter = tt.adapt(model, "cotta", views=5, threshold=1.0)
    adapter(batches(1, 4)[0])  # looks at the model first
    forwards.clear()
    adapter(batches(1, 4)[0])
    assert len(forwards) == 1 + 5


def test_each_part_has_its_own_statistics():
    x = torch.randn(12, 3, 4, 4)
    with InGroups(3):
        joined = F.batch_norm(x, None, None, training=True)
    alone = [F.batch_norm(part, None, None, training=True) for part in x.chunk(3)]
    assert torch.equal(joined, torch.cat(alone))
