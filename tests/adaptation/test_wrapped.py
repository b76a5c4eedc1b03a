"""Models as torch's own tools make them: scripted, compiled, quantised, observed; and their copies."""

import copy
import pickle
import threading
from functools import partial, wraps
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.ao.nn.intrinsic as fused
import torch.ao.quantization as ao
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import testtime as tt
from battery import ALL, adapter_of
from models import batches
from testtime._core.errors import InputError, ScopeError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def images(size: int = 8, count: int = 3) -> list[Tensor]:
    return list(torch.rand(count, 4, 3, size, size, generator=torch.Generator().manual_seed(0)))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()  # fmt: skip


def kept(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if isinstance(t, Tensor)}


def assert_given_back(model: nn.Module, was: dict[str, Tensor]) -> None:
    now = kept(model)
    assert now.keys() == was.keys()
    for name, tensor in was.items():
        assert torch.equal(now[name], tensor), name


def test_a_scripted_part_is_refused():
    model = nn.Sequential(nn.Identity(), torch.jit.script(network()))
    with pytest.raises(ScopeError, match="the part 1 of the model is scripted"):
        tt.adapt(model, "tent")
    with pytest.raises(ScopeError, match="the part 1 of the model is scripted"):
        tt.fit_source(model, images(), methods=["eata"])


@pytest.mark.slow
def test_a_model_that_meets_other_ranks_in_each_forward_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(network())
        adapter, plain = (tt.adapt(each, "tent") for each in (model, model.module))
        for x in images():
            assert torch.equal(adapter(x), plain(x))
        model.process_group = SimpleNamespace(size=lambda: 2)
        with pytest.raises(ScopeError, match="Give what it holds"):
            tt.adapt(model, "tent")
    finally:
        dist.destroy_process_group()


def watched() -> nn.Module:
    model = network()
    model.qconfig = ao.get_default_qconfig("x86")
    return ao.prepare(model)


def trained_for_quantisation() -> nn.Module:
    model = network().train()
    model.qconfig = ao.get_default_qat_qconfig("fbgemm")
    return ao.prepare_qat(model).eval()


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("make", [watched, trained_for_quantisation])
@pytest.mark.parametrize("method", ["tent", "cotta"])
def test_what_observers_saw_stays_as_it_was(method, make, used):
    model = make()
    if used:
        model(images()[1])
    was = kept(model)
    adapter = tt.adapt(model, method, **{"views": 2} if method == "cotta" else {})
    for factor, x in enumerate(images(), start=1):  # they note what is new
        adapter(x.pow(2 * factor))
    adapter.export()
    assert_given_back(model, was)


@pytest.mark.parametrize("method", ["tent", "bn-adapt", "rotta"])
def test_a_normalisation_that_is_fused_for_quantisation_takes_statistics_of_the_batch(method):
    plain = network()
    model = nn.Sequential(fused.ConvBnReLU2d(*network()[:3]), *network()[3:]).train()
    model.qconfig = ao.get_default_qat_qconfig("fbgemm")
    model = ao.prepare_qat(model).eval().apply(ao.disable_fake_quant)
    adapter, expected = (tt.adapt(each, method) for each in (model, plain))
    for x in images():
        torch.testing.assert_close(adapter(x), expected(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.export()(x), adapter.predict(x), rtol=1e-4, atol=1e-4)


class Written(nn.BatchNorm2d):
    """Normalisation written out, which reads the statistics that it stored."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class Frozen(nn.BatchNorm2d):
    """Normalisation that never takes statistics of the batch by itself."""

    def forward(self, x: Tensor) -> Tensor:
        own = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *own, False, 0.0, self.eps)


class Named(nn.BatchNorm2d):
    """As torch's, under another name: it takes what the others have to be given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("kind", [Written, Frozen, Named])
@pytest.mark.parametrize("method", ["tent", "bn-adapt"])
def test_a_normalisation_with_a_forward_of_its_own_takes_statistics_of_the_batch(method, kind):
    model, plain = network(), network()
    model[1] = kind(6).eval()
    adapter, expected = (tt.adapt(each, method) for each in (model, plain))
    for x in images():
        torch.testing.assert_close(adapter(x), expected(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.export()(x), adapter.predict(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["tent", "dent"])
def test_a_model_that_is_quantised_above_what_adapts_is_refused(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    model = ao.quantize_dynamic(model.eval(), {nn.Linear})
    with (
        pytest.warns(UserWarning, match="autograd kernel was not registered"),
        pytest.raises(ScopeError, match="is quantised after it"),
    ):
        tt.adapt(model, method)(images()[0])
    tt.adapt(model, "source")(images()[0])


@pytest.mark.slow
def test_a_compiled_forward_answers_as_a_plain_one_and_is_not_copied():
    torch._dynamo.reset()
    model = network()
    model.forward = torch.compile(model.forward, backend="eager")
    options = {"views": 4, "threshold": 1.0, "restore": 0.0}
    adapter, plain = (tt.adapt(m, "cotta", **options) for m in (model, network()))
    for x in images():
        torch.testing.assert_close(adapter(x), plain(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ScopeError, match="Compile the module itself"):
        adapter.export()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [("domainadaptor", {"lr": 0.0}), ("bn-adapt", {"prior": 16}), ("cafa", {})],
)
def test_a_model_that_was_compiled_before_calls_what_is_hooked_to_it(method, options):
    torch._dynamo.reset()
    model = torch.compile(network(), backend="eager")
    xs = images()
    first = tt.adapt(model, "sar", margin=2.0)
    for x in (xs[0], xs[0][:2], xs[0][:3]):  # from here on any size runs what is compiled
        with torch.no_grad():
            model(x)
        first(x)
    answers = []
    for each in (network(), model):
        source = tt.fit_source(each, [(x, torch.arange(4)) for x in xs], methods=[method])
        adapter = tt.adapt(each, method, source=source, **options)
        answers.append([adapter(x) for x in xs])
        with torch.no_grad():
            torch.testing.assert_close(adapter.export()(x), adapter.predict(x))
    for mine, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_that_mixes_statistics_may_be_copied_and_pickled(again):
    adapter, x = tt.adapt(network(), "bn-adapt", prior=16), images()[0]
    adapter(x)
    exported = adapter.export()
    more = again(exported)
    expected = exported(x)
    exported[1].running_mean += 1
    assert torch.equal(more(x), expected)
    torch.testing.assert_close(expected, adapter.predict(x))


def doubled(forward, x: Tensor) -> Tensor:
    return forward(x * 2)


@pytest.mark.parametrize(
    "replaced",
    [
        lambda m, forward: lambda x: forward(x * 2),
        lambda m, forward: MethodType(lambda self, x: forward(x * 2), m),
        lambda m, forward: wraps(forward)(lambda x: doubled(forward, x)),
    ],
)
def test_a_forward_that_runs_the_model_in_a_copy_is_not_exported(replaced):
    model = network()
    model.forward = replaced(model, model.forward)
    adapter = tt.adapt(model, "tent")
    adapter(images()[0])
    with pytest.raises(ScopeError, match="was replaced by a function"):
        adapter.export()


def test_a_forward_whose_arguments_are_copied_is_exported():
    model = network()
    model.forward = partial(doubled, model.forward)
    adapter = tt.adapt(model, "tent", lr=0.1)
    adapter(images()[0])
    x = images()[1]
    torch.testing.assert_close(adapter.export()(x), adapter.predict(x))


def test_a_model_that_cannot_be_copied_says_so():
    model = network()
    model.lock = threading.Lock()
    adapter = tt.adapt(model, "tent")
    adapter(images()[0])
    with pytest.raises(ScopeError, match="cannot be copied"):
        adapter.export()


@pytest.mark.parametrize("where", [lambda h: h, lambda h: [h], lambda h: {"h": h}])
def test_what_a_training_left_behind_does_not_hinder_a_copy(where):
    model = network()
    nn.utils.weight_norm(model[0])
    model[0].seen = where(model[0](images()[0]))  # and the weight has a graph
    adapter = tt.adapt(model, "tent", lr=0.1)
    adapter(images()[0])
    x = images()[1]
    torch.testing.assert_close(adapter.export()(x), adapter.predict(x))


class Resized(nn.Module):
    """Keeps what it derives for a size that is not its own, and what it saw with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.position = nn.Parameter(torch.rand(1, 3, 8, 8, generator=torch.Generator()))
        self.register_buffer("mask", torch.ones(8, 8))
        self.register_buffer("taught", torch.zeros(()))
        self.derived: Tensor | None = None
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.taught += 1
            self.last = x * self.position.mean()
        if x.shape[-1] == 8:
            return self.net((x + self.position) * self.mask[:8, :8])
        if self.derived is None:
            self.derived = F.interpolate(self.position, size=x.shape[2:])
            self.mask = torch.ones(x.shape[2:]) / 2
        return self.net((x + self.derived) * self.mask)


@pytest.mark.parametrize("method", ["tent", "cotta", "memo", "bn-adapt"])
def test_what_a_model_writes_at_other_sizes_or_for_a_backward_is_taken_back(method):
    model = Resized().eval()
    was, buffers = kept(model), dict(model.named_buffers())
    options = {"views": 2} if method in ("cotta", "memo") else {}
    adapter = tt.adapt(model, method, **options)
    small, large = images(), images(12)
    for x in (small[0], large[0], small[1], large[1]):
        adapter(x)
    assert_given_back(model, was)
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert model.derived is None
    assert model.last is None
    adapter.export()


def test_views_do_not_hang_on_the_default_type():
    model, x = network(), images()[0]
    expected = tt.adapt(model, "memo", views=2)(x)
    torch.set_default_dtype(torch.float64)
    try:
        answer = tt.adapt(model, "memo", views=2)(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(answer, expected)


@pytest.mark.parametrize("name", ALL)
def test_no_draw_hangs_on_the_default_type(name):
    expected, adapter = adapter_of(name), adapter_of(name)
    for x in batches(2):
        torch.set_default_dtype(torch.float64)
        try:
            answer = adapter(x)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(answer, expected(x), rtol=0, atol=1e-3)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask


class OfNames(nn.Module):
    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return x["image"]


@pytest.mark.parametrize(
    ("model", "x", "says"),
    [
        (OfNames(), {"image": torch.ones(2, 3)}, "put a module around it"),
        (TwoInputs(), torch.ones(2, 3), "put a module around it"),
        (nn.Embedding(9, 3), torch.ones(2, 3, dtype=torch.long), "after their embedding"),
    ],
)
def test_who_takes_other_than_one_tensor_is_told_the_way_out(model, x, says):
    with pytest.raises(InputError, match=says):
        tt.adapt(model, "source")(x)
