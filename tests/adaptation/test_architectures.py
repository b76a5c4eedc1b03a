"""Every method on architectures of torchvision, timm and transformers, small and untrained."""

import copy
import math
from functools import lru_cache, partial

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn

import testtime as tt
from testtime._core.errors import ScopeError
from testtime._core.outcomes import Outcome
from testtime.adaptation.methods.petal import petal
from testtime.adaptation.outputs import read_logits

# sade is for models of several experts, and sqrl, for tables, need not find a rule in few images
ALL = sorted(set(tt.methods()) - {"sade", "sqrl"})
EASY = {  # small memories, few views, and margins that every sample passes
    "eta": {"margin": 2.0, "redundancy": 1.0},
    "eata": {"margin": 2.0, "redundancy": 1.0},
    "rdumb": {"margin": 2.0, "redundancy": 1.0},
    "sar": {"margin": 2.0, "recover_below": 0.0},
    "deyo": {"entropy_margin": 2.0, "drop_margin": -1.0},
    "cotta": {"views": 2, "threshold": 1.0},
    "psmt": {"views": 2, "threshold": 1.0},
    "petal": {"views": 2, "threshold": 1.0},
    "rotta": {"capacity": 4, "every": 4},
    "memo": {"views": 2},
    "stamp": {"views": 2, "margin": 2.0, "agreement": False},
    "simatta": {"e_low": 9.0, "steps": 3},
    "vcotta": {"views": 2},
    "tesla": {"views": 2},
    "foa": {"population": 4},
}
TRANSFORMERS = ("vit", "vit_tiny_patch16_224", "ViT")  # FOA takes no others
CLASSES = 7


class NarrowResNet(tv.ResNet):
    """A ResNet whose layers have an eighth of the channels."""

    def __init__(self):
        super().__init__(tv.resnet.BasicBlock, [1, 1, 1, 1])
        self.fc = nn.Linear(64, CLASSES)

    def _make_layer(self, block, planes, *args, **options):
        return super()._make_layer(block, planes // 8, *args, **options)


def tv_mobilenet_v3():
    block = tv.mobilenetv3.InvertedResidualConfig
    settings = [
        block(8, 3, 8, 8, True, "RE", 2, 1, 1),
        block(8, 3, 24, 12, False, "RE", 2, 1, 1),
        block(12, 5, 48, 12, True, "HS", 1, 1, 1),
    ]
    return tv.MobileNetV3(settings, 32, num_classes=CLASSES)


def tv_efficientnet():
    block = tv.efficientnet.MBConvConfig
    settings = [block(1, 3, 1, 8, 8, 1, 1, 1), block(4, 3, 2, 8, 16, 1, 1, 1)]
    return tv.EfficientNet(settings, dropout=0.2, num_classes=CLASSES, last_channel=32)


def tv_convnext():
    block = tv.convnext.CNBlockConfig
    settings = [block(8, 16, 1), block(16, 24, 1), block(24, 32, 1), block(32, None, 1)]
    return tv.ConvNeXt(settings, num_classes=CLASSES)


TORCHVISION = {
    "resnet": NarrowResNet,
    "mobilenet_v3": tv_mobilenet_v3,
    "efficientnet": tv_efficientnet,
    "convnext": tv_convnext,
    "densenet": partial(tv.DenseNet, 4, (2, 2, 2), 8, num_classes=CLASSES),
    "vit": partial(tv.VisionTransformer, 32, 8, 4, 2, 16, 32, num_classes=CLASSES),
    "swin": partial(
        tv.SwinTransformer, [4, 4], 8, [1, 1, 1, 1], [1, 1, 2, 2], [2, 2], num_classes=CLASSES
    ),
}
TIMM = {
    "resnet10t": {},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 4},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 2, "depths": (1, 1, 1, 1)},
    "convnext_atto": {},
    "efficientnet_lite0": {},
    "mobilenetv4_conv_small": {},
    "regnetx_002": {},
    "edgenext_xx_small": {},
    "maxvit_rmlp_pico_rw_256": {"img_size": 32, "depths": (1, 1, 1, 1)},
}


def of_timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=CLASSES, **TIMM[name])


def of_transformers(name: str) -> nn.Module:
    import transformers as hf

    config = {
        "ViT": {
            "image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 4,
            "num_attention_heads": 2, "intermediate_size": 32,
        },
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        "Swin": {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
                 "window_size": 4},
    }[name]  # fmt: skip
    made = getattr(hf, f"{name}Config")(**config, num_labels=CLASSES)
    return getattr(hf, f"{name}ForImageClassification")(made)


@lru_cache(maxsize=1)
def built(make) -> nn.Module:
    """One model for all methods: whatever one of them left behind, the next would stumble on."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        with torch.no_grad():
            nn.init.normal_(head.weight)
            for x in images(4, seed=5):
                model(x)
    return model.eval()


def images(count: int, *, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 4, 3, 8, 8, generator=generator)
    x = nn.functional.interpolate(x.flatten(0, 1), scale_factor=4, mode="bilinear")
    return list(x.unflatten(0, (count, 4)).clamp(0, 1))


def check(make, method: str, path) -> None:
    model = built(make)
    was = copy.deepcopy(model.state_dict())
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    *begin, last = images(3)
    with torch.no_grad():
        plain = model(last)
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if method == "bn-adapt" and not batch_norm:
        with pytest.raises(ScopeError, match="stores none"):
            tt.adapt(model, method)
        return
    needs = tt.methods()[method].needs
    loader = images(2, seed=2)
    if (
        method == "cafa"
    ):  # of one class, which random weights may predict for all, nothing is learnt
        loader = [(x, torch.arange(len(x)) % CLASSES) for x in loader]
    asked = (
        [petal(source_lr=1e-5)] if method == "petal" else [method]
    )  # random weights, random labels
    source = tt.fit_source(model, loader, methods=asked) if needs else None
    one, two = (tt.adapt(model, method, source=source, **EASY.get(method, {})) for _ in range(2))
    for x in begin:
        one(x)
    one.save(path)
    two.load(path)
    told = read_logits(one.predict(last))
    answer = one(last)
    logits = read_logits(answer)
    assert type(answer) is type(plain)
    assert logits.shape == (4, CLASSES)
    assert logits.isfinite().all()
    assert torch.equal(read_logits(two(last)), logits)
    if method not in ("memo", "tesla", "foa"):  # these answer after their step
        torch.testing.assert_close(told, logits)

    tensors = one.snapshot().tensors
    if tensors:
        assert {event.outcome for event in one.events} <= {Outcome.ADAPTED}
    if tensors and method not in ("memo", "domainadaptor", "dent"):  # these keep nothing
        assert any(not torch.equal(value, was[name]) for name, value in tensors.items())
    changes = not torch.equal(logits, read_logits(plain))
    assert changes == (method != "source")

    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()] == hooks
    assert not any(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, was[name])
    assert math.isfinite(sum(event.entropy for event in one.events))


def check_or_refuse(make, name: str, method: str, path) -> None:
    if method != "foa" or name in TRANSFORMERS:
        check(make, method, path)
    else:
        with pytest.raises(ScopeError, match="vision transformer"):
            check(make, method, path)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name, method, tmp_path):
    check_or_refuse(TORCHVISION[name], name, method, tmp_path / "state")


@lru_cache
def timm_maker(name):
    return partial(of_timm, name)


@lru_cache
def transformers_maker(name):
    return partial(of_transformers, name)


@pytest.mark.extra
@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, method, tmp_path):
    check_or_refuse(timm_maker(name), name, method, tmp_path / "state")


@pytest.mark.extra
@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("name", ["ViT", "ResNet", "ConvNext", "Swin"])
def test_transformers(name, method, tmp_path):
    check_or_refuse(transformers_maker(name), name, method, tmp_path / "state")
