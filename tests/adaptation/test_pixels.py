"""Models that answer each pixel: every pixel is a sample of its own, and views are brought back."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import testtime as tt
from battery import alike
from reference import domainadaptor as folding
from reference import methods as reference
from reference.lerm import Lerm
from reference.pixels import CottaOfPixels
from reference.teachers import posterior
from testtime._core.errors import InputError
from testtime.adaptation.outputs import rows
from testtime.adaptation.parts.scales import scaled_size

LN = math.log(5)


class Segmenter(nn.Module):
    """Convolutions with normalisation, answers at half the resolution, and something besides."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        made = (lambda n: nn.GroupNorm(2, n)) if norm is nn.GroupNorm else norm
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), made(6), nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), made(8), nn.ReLU(),
            nn.Conv2d(8, 5, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.net[:3](x)
        return {"aux": h.mean((2, 3)), "out": self.net[3:](h)}


class Logits(nn.Module):
    """The logits of a segmenter alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)["out"]


class Rows(Logits):
    """Logits as of a classifier whose samples are pixels, in order of batch, height and width."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([z.flatten(1).T for z in super().forward(x)])


def segmenter(norm: type[nn.Module] = nn.BatchNorm2d) -> Segmenter:
    torch.manual_seed(0)
    model = Segmenter(norm).double()
    with torch.no_grad():
        model.net[-1].weight.mul_(4)
        for _ in range(20):
            model(torch.rand(8, 3, 12, 20).double())
    return model.eval()


def images(count: int = 4, batch: int = 2) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    noise = torch.rand(count, batch, 3, 12, 20, generator=random, dtype=torch.float64)
    return list(noise * torch.linspace(0.2, 1, 20, dtype=torch.float64))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.GroupNorm])
@pytest.mark.parametrize("threshold", [0.7, 1.0])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.filterwarnings("ignore:a batch of one")
def test_cotta_of_pixels_is_that_of_the_paper(norm, threshold, batch):
    model = segmenter(norm)
    before = copy.deepcopy(model.state_dict())
    other = CottaOfPixels(Logits(model), 1e-3, 0.99, threshold, step=4)
    adapter = tt.adapt(model, "cotta", threshold=threshold, momentum=0.99, restore=0.0)
    for x in images(batch=batch):
        expected = other(x)
        told, answer = adapter.predict(x), adapter(x)
        torch.testing.assert_close(answer["out"].softmax(1), expected, rtol=0, atol=1e-9)
        assert torch.equal(told["out"], answer["out"])
        assert answer.keys() == told.keys() == {"aux", "out"}
        assert other.sure == 0 if threshold == 1 else 0.1 < other.sure < 0.9
    state = adapter.snapshot()
    for name, value in other.student.model.named_parameters():
        torch.testing.assert_close(state.tensors[name], value.detach(), rtol=0, atol=1e-9)
    assert alike(dict(model.state_dict()), dict(before))


def test_what_cotta_of_pixels_costs():
    model = segmenter()
    sure = tt.adapt(model, "cotta", threshold=0.05)
    unsure = tt.adapt(model, "cotta", threshold=0.7)
    for adapter, forwards in ((sure, 3), (unsure, 16)):
        x = images(1)[0]
        adapter(x)
        assert adapter.counts.forwards == forwards * len(x)
        assert adapter.plan().forwards == 16


def test_a_model_of_one_size_is_told_of():
    class OneSize(Segmenter):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            assert x.shape[-1] == 20, "20 pixels alone"
            return super().forward(x)

    model = OneSize().eval()
    x = images(1)[0].float()
    adapter = tt.adapt(model, "cotta", threshold=1.0)
    mark = adapter.snapshot()
    with pytest.raises(
        InputError, match=r"(?s)does not take \(2, 3, 8, 12\): 20 pixels.*threshold=0"
    ):
        adapter(x)
    assert alike(vars(adapter.snapshot()), vars(mark))
    assert tt.adapt(model, "cotta", threshold=0.0)(x)["out"].isfinite().all()


def tent_pair(model, model_of_rows):
    return tt.adapt(model, "tent", lr=1e-2), reference.Tent(model_of_rows, 1e-2)


def eta_pair(model, model_of_rows):
    adapter = tt.adapt(model, "eta", lr=1e-2, margin=0.5, redundancy=0.95)
    return adapter, reference.Eata(model_of_rows, 1e-2, 0.5 * LN, 0.95, None, 0.0)


def eata_pair(model, model_of_rows):
    known = tt.fit_source(model, images(2), methods=["eata"])
    fisher = reference.fisher(model_of_rows, images(2))
    adapter = tt.adapt(model, "eata", source=known, lr=1e-2, margin=0.5, redundancy=0.95, beta=50.0)
    return adapter, reference.Eata(model_of_rows, 1e-2, 0.5 * LN, 0.95, fisher, 50.0)


def sar_pair(model, model_of_rows):
    adapter = tt.adapt(model, "sar", lr=1e-2, margin=0.5, batch_size=64, recover_below=0.0)
    return adapter, reference.Sar(model_of_rows, 1e-2, 0.5 * LN, 0.05, 0.0)


def ostta_pair(model, model_of_rows):
    return tt.adapt(model, "ostta", lr=1e-2), reference.Ostta(model_of_rows, 1e-2, 0.5)


def lerm_pair(model, model_of_rows):
    return tt.adapt(model, "lerm", lr=1e-2), Lerm(model_of_rows, 1e-2)


PAIRS = [tent_pair, eta_pair, eata_pair, sar_pair, ostta_pair, lerm_pair]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.GroupNorm])
@pytest.mark.parametrize("pair", PAIRS)
def test_each_pixel_is_a_sample(pair, norm):
    model = segmenter(norm)
    adapter, other = pair(model, Rows(model))
    shares = set()
    for x in images(5):
        answer = adapter(x)["out"]
        torch.testing.assert_close(rows(answer), other(x), rtol=0, atol=1e-9)
        shares.add(int(adapter.events[-1].used))
    pixels = answer[:, 0].numel()
    if pair in (eta_pair, eata_pair, sar_pair):
        assert len(shares) > 1
        assert 0 < max(shares) < pixels
    learnt = dict(other.model.model.named_parameters())
    for name, value in adapter.snapshot().tensors.items():
        torch.testing.assert_close(value, learnt[name].detach(), rtol=0, atol=1e-9)
    if pair is eta_pair:
        assert shares == set(other.taught)


@pytest.mark.parametrize("loss", ["gem-t", "gem-skd"])
def test_domainadaptor_of_pixels(loss):
    model = segmenter()
    adapter = tt.adapt(model, "domainadaptor", lr=1e-2, loss=loss)
    for x in images():
        own = Rows(model)
        own.model = copy.deepcopy(model).requires_grad_(False)
        for place in (1, 4):
            own.model.net[place] = folding.AdaMix(model.net[place])
        z = own(x)
        folding.gem(z, z.softmax(1) if loss == "gem-skd" else None).backward()
        with torch.no_grad():
            for p in own.parameters():
                if p.grad is not None:
                    p.sub_(1e-2 * p.grad)
            torch.testing.assert_close(rows(adapter(x)["out"]), own(x), rtol=0, atol=1e-9)


def labelled_pixels(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(x, (5 * x.mean(1)[:, ::2, ::2]).long()) for x in images(count)]


@pytest.mark.filterwarnings("ignore:a batch of one")
def test_petal_of_pixels():
    model, loader = segmenter(), labelled_pixels(3)
    known = tt.fit_source(model, loader, methods=["petal"])
    mean, var = posterior(Rows(model), [(x, y.flatten()) for x, y in loader], 5, 1e-2)
    found = known["weight-posterior"]
    mean, var = ({n.removeprefix("model."): t for n, t in d.items()} for d in (mean, var))
    for name, value in mean.items():
        torch.testing.assert_close(found[f"mean {name}"], value.double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(found[f"var {name}"], var[name].double(), rtol=0, atol=1e-6)
    adapter = tt.adapt(model, "petal", source=known, rho=0.0, momentum=0.9, share=0.0)
    other = tt.adapt(model, "cotta", momentum=0.9, restore=0.0)
    for x in images(3):
        torch.testing.assert_close(adapter(x)["out"], other(x)["out"], rtol=0, atol=1e-9)


def test_labels_of_pixels_that_do_not_fit_are_refused():
    for y in (torch.zeros(2, dtype=torch.long), torch.full((2, 6, 10), 255)):
        with pytest.raises(
            InputError, match=r"the class of each pixel of \(2, 6, 10\) .* from 0 to 4"
        ):
            tt.fit_source(segmenter(), [(images(1)[0], y)], methods=["petal"])


def test_scaled_sides_are_divided_as_before():
    for side in (32, 96, 540, 33, 640):
        divides = next(step for step in (32, 16, 8, 4, 2, 1) if side % step == 0)
        for scale in (0.5, 0.75, 1.25, 1.75):
            (scaled,) = scaled_size((side,), scale)
            assert scaled % divides == 0
            assert scale * side <= scaled < scale * side + divides


def two_kinds() -> tuple[list[Tensor], float]:
    """Batches of two images, and a confidence that each pixel of the second has in the first batch."""
    xs = images(3)
    surest = tt.adapt(segmenter(), "bn-adapt")(xs[0])["out"].softmax(1).amax(1).flatten(1).amin(1)
    order = surest.argsort()
    assert surest[order[1]] - surest[order[0]] > 1e-3
    return [x[order] for x in xs], float(surest.mean())


def work(rank: int, folder: str, xs: list[Tensor], threshold: float) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    adapter = tt.adapt(
        segmenter(), "cotta", threshold=threshold, restore=0.0, process_group=dist.group.WORLD
    )
    torch.save([adapter(x[rank : rank + 1])["out"] for x in xs], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_rank_without_an_unsure_pixel_makes_views_for_the_others(tmp_path):
    xs, threshold = two_kinds()
    mp.spawn(work, (str(tmp_path), xs, threshold), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    adapter = tt.adapt(segmenter(), "cotta", threshold=threshold, restore=0.0)
    for x, *parts in zip(xs, *halves, strict=True):
        torch.testing.assert_close(torch.cat(parts), adapter(x)["out"], rtol=0, atol=1e-9)
