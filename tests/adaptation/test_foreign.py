"""Models as other people write them: what they keep, share, cache, checkpoint and refuse."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import testtime as tt
from battery import adapter_of, alike, each
from models import TinyNet, batches, tiny
from testtime._core.errors import InputError, ScopeError
from testtime.adaptation.look import look
from testtime.adaptation.outputs import read_logits


def sounds(count: int = 3) -> list[Tensor]:
    return list(torch.rand(count, 4, 60, generator=torch.Generator().manual_seed(0)))


def images(count: int = 3, size: int = 8) -> list[Tensor]:
    return list(torch.rand(count, 4, 3, size, size, generator=torch.Generator().manual_seed(0)))


def network(head: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        head or nn.Linear(6, 4),
    ).eval()  # fmt: skip


class Sounds(nn.Module):
    """Takes (batch, length) and has one-dimensional convolutions, as wav2vec does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 6, 5, stride=2), nn.BatchNorm1d(6)
        self.memory = nn.GRU(6, 5, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x[:, None])).relu()
        return self.head(self.memory(h.transpose(1, 2))[0][:, -1])


class Caching(nn.Module):
    """Keeps what it derives from a parameter in eval mode, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.bias = nn.Parameter(torch.ones(4))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias * torch.tensor([1.0, 2.0, 3.0, 4.0])
        return self.net(x) + self.cache["bias"]


class Counting(nn.Module):
    """Counts its forwards in a buffer and keeps what it saw last."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.last = self.net[:3](x)
        return self.net(x)


class Checkpointing(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = network(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.net[1](self.net[0](x))
        return checkpoint(self.net[2:], h, use_reentrant=self.reentrant)


class TwoHeads(nn.Module):
    """A head for domains runs after the classifier, on what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.domains = network(), nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"logits": logits, "domain": self.domains(logits)}


class Asserting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 8, "images of 8 pixels alone"
        return self.net(x)


class ByName(TinyNet):
    """Calls its layers by the names of their arguments."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(input=self.conv1(input=x)).relu()
        x = self.norm2(input=self.conv2(input=x)).relu()
        return self.head(input=x.mean((2, 3)))


@each
def test_layers_may_be_called_by_name(name):
    model = tiny()
    other = ByName().eval()
    other.load_state_dict(model.state_dict())
    one, two = adapter_of(name, model), adapter_of(name, other)
    *begin, last = batches(3)
    for x in begin:
        assert torch.equal(two(x), one(x)), name
    assert torch.equal(two.predict(last), one.predict(last))
    with torch.no_grad():
        assert alike(two.export()(last), one.export()(last))


class Writing(nn.Module):
    """Normalises its batch in place, as transforms may."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.net, self.inplace = tiny(), inplace

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.sub_(0.5).mul_(2) if self.inplace else x.sub(0.5).mul(2))


@each
def test_a_model_that_writes_to_its_batch_gets_a_copy(name):
    one, two = (adapter_of(name, Writing(inplace=inplace).eval()) for inplace in (False, True))
    for x in batches(3):
        given = x.clone()
        assert alike(two.predict(given), one.predict(x))
        assert alike(two(given), one(x))
        assert torch.equal(given, x)


def without_shift() -> nn.Module:
    model = network(nn.Linear(6, 5))
    model[1].bias = None
    return model


def spaced() -> nn.Module:
    model = nn.Sequential()
    for place, layer in network(nn.Linear(6, 5)).named_children():
        model.add_module(f"layer {place} ü/", layer)
    return model.eval()


@each
@pytest.mark.parametrize("make", [without_shift, spaced])
def test_shifts_may_be_missing_and_names_hold_anything(name, make, tmp_path):
    model = make()
    one, two = (adapter_of(name, model) for _ in range(2))
    for x in images():
        one(x)
    one.save(tmp_path / "state")
    two.load(tmp_path / "state")
    assert alike(one(x), two(x))
    with torch.no_grad():
        assert read_logits(one.export()(x)).isfinite().all()


@pytest.mark.parametrize("prior", [None, 16])
@pytest.mark.parametrize("more", [{"gate": True}, {"guard": True}, {"budget": 0.5}, {}])
def test_whatever_else_looks_into_layers_takes_names(more, prior):
    model = ByName().eval()
    method = "tent" if prior is None else "bn-adapt"
    adapter = tt.adapt(model, method, **({} if prior is None else {"prior": prior}), **more)
    for x in batches(3):
        assert adapter(x).isfinite().all()
    with torch.no_grad():
        torch.testing.assert_close(adapter.export()(x), adapter.predict(x))


def test_sounds_without_a_channel_are_taken():
    model = Sounds().eval()
    adapter = tt.adapt(model, "tent")
    for x in sounds():
        adapter(x)
    assert adapter.counts.updates == 3
    with pytest.raises(InputError, match="2 dimensions"):
        adapter(sounds()[0][:, None])


@pytest.mark.parametrize("bad", [torch.rand(3, 8, 8), torch.rand(2, 3, 8, 8, 1)])
def test_a_first_batch_of_another_rank_is_refused(bad):
    adapter = tt.adapt(network(), "tent")
    mark = adapter.snapshot()
    with pytest.raises(InputError, match="single sample"):
        adapter(bad)
    assert adapter.snapshot() is mark
    adapter(images()[0])


def test_a_convolution_that_takes_a_batch_for_a_sample_is_noticed():
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.LayerNorm(6), nn.Linear(6, 6), nn.Flatten(0, 1))
    with pytest.raises(InputError, match="took for a single sample"):
        tt.adapt(model, "tent")(torch.rand(1, 8, 8))


def test_what_a_model_caches_is_its_own():
    model = Caching()
    with torch.no_grad():
        model(images()[0])  # the cache is full before anybody adapts
    kept, derived = model.cache, model.cache["bias"]
    adapter = tt.adapt(model, "memo", views=2, lr=0.1)
    recipe = adapter.recipe
    with torch.no_grad():
        moved = copy.deepcopy(model)
        moved.cache.clear()
        moved.bias += 1
    adapter(images()[0])
    assert model.cache is kept
    assert model.cache["bias"] is derived

    stepping = tt.adapt(model, "cotta", lr=0.1, views=2, restore=0.0)
    for x in images():
        stepping(x)
    learnt = stepping.snapshot().tensors["bias"]
    assert not torch.equal(learnt, model.bias)
    with torch.no_grad():
        copied = stepping.export()
        x = images()[0]
        changed = copied.bias * torch.tensor([1.0, 2.0, 3.0, 4.0])
        torch.testing.assert_close(copied(x), copied.net(x) + changed)
    assert recipe == adapter.recipe


def normalised(name: str) -> nn.Module:
    model = network()
    model[0] = getattr(nn.utils, name)(model[0])
    return model.eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["spectral_norm", "weight_norm"])
def test_a_weight_that_hooks_make_keeps_no_graph(name):
    model = normalised(name)
    with torch.no_grad():
        model(images()[0])
    own = model[0].weight
    adapter = tt.adapt(model, "tent", lr=0.1)
    for x in images():
        adapter(x)
    assert model[0].weight is own
    told = adapter.predict(x)
    torch.testing.assert_close(adapter.export()(x), told)


def test_recurrent_layers_keep_no_graph():
    model = Sounds().eval()
    flat = list(model.memory._flat_weights)
    adapter = tt.adapt(model, "memo", views=2, augment=lambda x, generator: x)
    adapter(sounds()[0])
    assert all(a is b for a, b in zip(model.memory._flat_weights, flat, strict=True))
    adapter.export()


def test_buffers_that_a_forward_writes_to_are_given_back():
    model = Counting()
    source = tt.fit_source(model, images(), methods=["eata"])
    adapter = tt.adapt(model, "eata", source=source, margin=2.0, redundancy=1.0)
    for x in images():
        adapter(x)
    adapter.export()
    assert int(model.seen) == 0
    assert model.last is None
    tt.adapt(model, "eata", source=source)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_checkpoints_is_refused_where_there_is_a_backward(reentrant):
    model = Checkpointing(reentrant=reentrant).eval()
    adapter = tt.adapt(model, "tent")
    mark = adapter.snapshot()
    with pytest.raises(ScopeError, match="set_grad_checkpointing"):
        adapter(images()[0])
    assert adapter.snapshot() is mark
    with save_on_cpu(), pytest.raises(ScopeError, match="set_grad_checkpointing"):
        adapter(images()[0])
    with pytest.raises(ScopeError, match="set_grad_checkpointing"):
        tt.fit_source(model, images(), methods=["eata"])
    assert tt.adapt(model, "bn-adapt")(images()[0]).isfinite().all()


class NoBackward(TinyNet):
    """A forward that somebody wrote for inference alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x).sigmoid()
        x *= 2
        return x


@pytest.mark.parametrize("options", [{}, {"deferred": True}, {"guard": True}])
def test_a_forward_for_inference_alone_is_refused_where_there_is_a_backward(options):
    model = NoBackward("layer").eval()
    (x,) = batches(1)
    adapter = tt.adapt(model, "tent", **options)
    with pytest.raises(ScopeError, match="written for inference alone"):
        _ = adapter(x), adapter.flush()
    assert adapter.counts.steps == 0
    with torch.no_grad():
        assert torch.equal(tt.adapt(model, "source")(x), model(x))


def test_channels_last_comes_back_from_a_file_as_it_was(tmp_path):
    model = network().to(memory_format=torch.channels_last)
    one, two = (tt.adapt(model, "cotta", views=2) for _ in range(2))
    one(images()[0])
    one.save(tmp_path / "state")
    two.load(tmp_path / "state")
    for name, tensor in one.snapshot().tensors.items():
        assert two.snapshot().tensors[name].stride() == tensor.stride()
    assert torch.equal(two(images()[1]), one(images()[1]))


@pytest.mark.parametrize(
    ("model", "place"),
    [
        (
            network(nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 4, 1), nn.Flatten())),
            "5.1",
        ),
        (TwoHeads(), "net.5"),
    ],
)
def test_features_are_what_the_classifier_takes(model, place):
    adapter = tt.adapt(model, "lame")
    adapter(images()[0])
    found = look(model, adapter._engine.loan, images()[0]).feature_layer
    assert found is model.get_submodule(place)


def test_what_a_model_asserts_is_told_as_an_input_error():
    adapter = tt.adapt(Asserting(), "tent")
    for _ in range(2):
        with pytest.raises(InputError, match="images of 8 pixels alone"):
            adapter(images(size=9)[0])
        adapter(images()[0])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rotta", {"capacity": 4, "every": 4}),
        ("stamp", {"views": 2, "margin": 2.0, "agreement": False}),
        ("simatta", {"e_low": 9.0, "steps": 1}),
    ],
)
def test_samples_of_another_size_do_not_enter_a_memory(method, options):
    adapter = tt.adapt(network(), method, **options)
    adapter(images()[0])
    mark = adapter.snapshot()
    with pytest.raises(InputError, match="remembers"):
        adapter(images(size=12)[0])
    assert adapter.snapshot() is mark
    assert adapter.predict(images(size=12)[0]).shape == (4, 4)
    adapter.reset()
    adapter(images(size=12)[0])


def test_a_batch_that_the_model_refuses_leaves_no_trace_of_itself():
    model = Counting().eval()
    adapter = tt.adapt(model, "tent")
    with pytest.raises(InputError, match="could not take"):
        adapter(torch.rand(4, 7, 8, 8))
    assert int(model.seen) == 0
    adapter(images()[0])
    assert int(model.seen) == 0
    assert model.last is None
