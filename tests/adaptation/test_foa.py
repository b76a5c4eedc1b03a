"""FOA against its reference, and what the battery asks of every method, on transformers."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn

import testtime as tt
from models import batches, tiny, tiny_vit
from reference import features as reference
from testtime._core.errors import InputError, ScopeError, StateError
from testtime._core.outcomes import Outcome
from testtime.adaptation.methods.foa import discrepancy, foa
from testtime.adaptation.outputs import read_logits
from testtime.adaptation.parts.evolution import CovarianceAdaptation

SMALL = {"prompts": 2, "population": 6}


def adapter_of(model: nn.Module | None = None, **more):
    model = tiny_vit() if model is None else model
    dtype = next(model.parameters()).dtype
    known = tt.fit_source(model, [x.to(dtype) for x in batches(3, seed=5)], methods="foa")
    return tt.adapt(model, "foa", source=known, **{**SMALL, **more})


@pytest.mark.parametrize("chunk", [1, 50, 200])
def test_foa(chunk):
    model = tiny_vit().double()
    adapter = adapter_of(model, chunk=chunk)
    draws = torch.Generator().set_state(adapter.snapshot().generator.clone())
    source = torch.cat(batches(3, seed=5)).double()
    other = reference.Foa(model, source, 2, 6, 0.4, draws)
    for x in batches():
        answer = adapter(x.double())
        torch.testing.assert_close(answer, other(x.double()), rtol=0, atol=1e-4)
    assert [event.loss for event in adapter.events] == pytest.approx(other.losses, abs=1e-4)
    memory = adapter.snapshot().memory
    torch.testing.assert_close(memory["hist"], other.hist, rtol=0, atol=1e-4)
    torch.testing.assert_close(memory["best"], torch.as_tensor(other.best), rtol=0, atol=1e-4)
    assert adapter.counts.forwards == 7 * 160
    assert adapter.counts.backwards == 0


def test_moments_of_class_tokens_are_those_of_all_images_at_once():
    model, xs = tiny_vit(), batches(3, 11)
    known = tt.fit_source(model, xs, methods="foa")["cls_moments"]
    other = reference.Foa(model, torch.cat(xs), 1, 4, 0.4, None)
    torch.testing.assert_close(known["mean"], other.mean.detach())
    torch.testing.assert_close(known["deviation"], other.std.detach())


def ellipsoid(x: Tensor) -> Tensor:
    return (torch.logspace(0, 3, x.shape[1], dtype=x.dtype) * (x - 1) ** 2).sum(1)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_search_finds_the_bottom_of_an_ill_conditioned_bowl(shift):
    strategy = CovarianceAdaptation(dimension=6, population=10)
    random, device = torch.Generator().manual_seed(0), torch.device("cpu")
    search = strategy.init(sigma=1.0, device=device)
    for _ in range(250):
        candidates = strategy.ask(search, random)
        search = strategy.tell(search, candidates, ellipsoid(candidates - shift))
    assert float(ellipsoid(search["mean"][None] - shift)) < 1e-8
    assert search["sigma"] < 1e-3


def test_the_model_is_borrowed_and_nothing_is_differentiated():
    model = tiny_vit()
    before, hooks = copy.deepcopy(model.state_dict()), count_hooks(model)
    adapter, chance = adapter_of(model), torch.get_rng_state()
    outside = [adapter(x) for x in batches(4)]
    assert torch.equal(torch.get_rng_state(), chance)
    assert count_hooks(model) == hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    again = adapter_of(model.requires_grad_(False))
    for x, expected in zip(batches(4), outside, strict=True):
        with torch.inference_mode():
            assert torch.equal(again(x + 0), expected)


def count_hooks(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


def test_states_go_to_disk_and_back_and_reset_is_exact(tmp_path):
    first, second = adapter_of(), adapter_of()
    xs = batches(6)
    begin = [first(x) for x in xs[:3]]
    mark = first.snapshot()
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    later = [first(x) for x in xs[3:]]
    assert all(torch.equal(second(x), y) for x, y in zip(xs[3:], later, strict=True))
    first.restore(mark)
    assert all(torch.equal(first(x), y) for x, y in zip(xs[3:], later, strict=True))
    first.reset()
    assert all(torch.equal(first(x), y) for x, y in zip(xs[:3], begin, strict=True))
    with pytest.raises(StateError, match="another method"):
        adapter_of(prompts=1).restore(mark)


def test_predict_changes_nothing_and_is_the_source_at_first():
    model, xs = tiny_vit(), batches(3)
    adapter = adapter_of(model)
    with torch.no_grad():
        assert torch.equal(adapter.predict(xs[0]), model(xs[0]))
    adapter(xs[0])
    mark = adapter.snapshot()
    assert torch.equal(adapter.predict(xs[1]), adapter.predict(xs[1]))
    assert adapter.snapshot() is mark


def test_a_batch_of_one_and_bad_input():
    adapter = adapter_of()
    assert adapter(batches(1, 1)[0]).isfinite().all()
    assert adapter.events[-1].outcome is Outcome.ADAPTED  # by the mean alone
    assert float(discrepancy(torch.tensor([[3.0, 4.0]]), torch.zeros(2), torch.ones(2))) == 25
    mark = adapter.snapshot()
    with pytest.raises(InputError, match="NaN"):
        adapter(batches(1)[0] * math.nan)
    assert adapter.snapshot() is mark


def test_a_step_that_is_not_finite_changes_nothing():
    model, xs = tiny_vit(), batches(3)
    adapter = adapter_of(model)
    adapter(xs[0])
    mark = adapter.snapshot()
    with torch.no_grad():
        kept = model.head.bias.clone()
        model.head.bias[0] = math.nan
    assert adapter(xs[1]).shape == (16, 5)
    assert adapter.events[-1].outcome is Outcome.NON_FINITE
    assert adapter.snapshot().memory is mark.memory
    with torch.no_grad():
        model.head.bias.copy_(kept)
    assert adapter(xs[2]).isfinite().all()


class Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_vit()

    def forward(self, x):
        logits = self.net(x)
        return {"logits": logits, "sums": x.mean((1, 2, 3)), "loss": logits.mean(), "no": None}


def test_outputs_keep_their_kind():
    adapter, plain = adapter_of(Told().eval()), adapter_of()
    for x in batches(3):
        answer = adapter(x)
        torch.testing.assert_close(answer["logits"], plain(x))
        torch.testing.assert_close(answer["sums"], x.mean((1, 2, 3)))
        assert answer["loss"].shape == ()


def test_half_precision():
    adapter = adapter_of(tiny_vit().bfloat16())
    for x in batches(2):
        answer = adapter(x.bfloat16())
        assert answer.isfinite().all()
        assert answer.dtype == torch.bfloat16
    mixed = adapter_of()
    with torch.autocast("cpu", torch.bfloat16):
        assert mixed(batches(1)[0]).isfinite().all()


def test_the_value_of_a_batch_that_comes_again_falls():
    adapter, x = adapter_of(population=12), batches(1)[0]
    for _ in range(12):
        adapter(x)
    losses = [event.loss for event in adapter.events]
    assert all(after <= before + 1e-4 for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "model", [tiny(), tv.SwinTransformer([4, 4], 8, [2, 2], [1, 1], [2, 2], num_classes=5).eval()]
)
def test_other_models_are_refused(model):
    xs = batches(1) if model.__class__.__name__ == "TinyNet" else [torch.rand(2, 3, 32, 32)]
    with pytest.raises(ScopeError, match="first token the same for every image"):
        tt.fit_source(model, xs, methods="foa")


def without_class_token() -> nn.Module:
    import timm

    return timm.create_model(
        "vit_base_patch16_siglip_224", img_size=32, depth=2, num_classes=5
    ).eval()


@pytest.mark.extra
def test_a_transformer_without_a_class_token_is_refused():
    with pytest.raises(ScopeError, match="first token the same for every image"):
        tt.fit_source(without_class_token(), [torch.rand(2, 3, 32, 32)], methods="foa")


def of_timm(name: str, **options) -> nn.Module:
    import timm

    return timm.create_model(name, img_size=32, depth=3, num_classes=5, **options)


def of_transformers(**options) -> nn.Module:
    import transformers as hf

    config = hf.ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=3,
        num_attention_heads=2, intermediate_size=32, num_labels=5, **options,
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


MODELS = {
    "torchvision": partial(tv.VisionTransformer, 32, 8, 3, 2, 16, 32, num_classes=5),
    "timm": partial(of_timm, "vit_tiny_patch16_224"),
    "timm, registers": partial(of_timm, "vit_small_patch14_reg4_dinov2", patch_size=8),
    "timm, deit": partial(of_timm, "deit_tiny_distilled_patch16_224"),
    "timm, mean of tokens": partial(
        of_timm, "vit_tiny_patch16_224", global_pool="avg", fc_norm=False
    ),
    "transformers": of_transformers,
    "transformers, hidden states": partial(of_transformers, output_hidden_states=True),
}


@pytest.mark.parametrize(
    "name",
    [n if n == "torchvision" else pytest.param(n, marks=pytest.mark.extra) for n in MODELS],
)
def test_transformers_of_libraries(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        nn.init.normal_(head.weight)
    xs = list(torch.rand(4, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    known = tt.fit_source(model, xs[:2], methods="foa")
    adapter = tt.adapt(model, foa(**SMALL), source=known)
    with torch.no_grad():
        plain = model(xs[0])
    for x in xs:
        answer = adapter(x)
        assert type(answer) is type(plain)
        assert read_logits(answer).isfinite().all()
        assert read_logits(answer).shape == (4, 5)
    assert not torch.equal(read_logits(answer), read_logits(plain))
    assert {event.outcome for event in adapter.events} == {Outcome.ADAPTED}
    if "hidden states" in name:
        assert all(each.shape == (4, 17 + SMALL["prompts"], 16) for each in answer.hidden_states)
