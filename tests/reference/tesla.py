"""TeSLA once more, as plainly as its algorithm box; nothing here comes from the library."""

import copy
import itertools
import math

import torch
import torchvision.transforms.functional as TF
from torch import Tensor
from torch.nn import functional as F

SIGNED = ("shear x", "shear y", "translate x", "translate y", "rotate")
RANGES = {
    "shear x": (-0.3, 0.3), "shear y": (-0.3, 0.3), "translate x": (-0.45, 0.45),
    "translate y": (-0.45, 0.45), "contrast": (0.1, 1.9), "color": (0.1, 1.9),
    "brightness": (0.1, 1.9), "sharpness": (0.1, 1.9), "rotate": (-math.pi / 6, -math.pi / 6),
    "autocontrast": (0, 1), "invert": (0, 1), "equalize": (0, 1), "solarize": (0, 1),
    "posterize": (4, 8),
}  # fmt: skip


def warp(x: Tensor, a, b, c, d, e, f) -> Tensor:
    theta = torch.stack([torch.as_tensor(v, dtype=x.dtype).reshape(()) for v in (a, b, c, d, e, f)])
    grid = F.affine_grid(theta.view(1, 2, 3), [1, *x.shape], align_corners=False)
    return F.grid_sample(x[None], grid, padding_mode="reflection", align_corners=False)[0]


def change(x: Tensor, name: str, v: Tensor) -> Tensor:
    """One image (C, H, W) under one operation of size v."""
    if name == "shear x":
        return warp(x, 1, v, 0, 0, 1, 0)
    if name == "shear y":
        return warp(x, 1, 0, 0, v, 1, 0)
    if name == "translate x":
        return warp(x, 1, 0, v, 0, 1, 0)
    if name == "translate y":
        return warp(x, 1, 0, 0, 0, 1, v)
    if name == "rotate":
        return warp(x, v.cos(), v.sin(), 0, -v.sin(), v.cos(), 0)
    if name == "contrast":
        return v * x + (1 - v) * x.mean()
    if name == "color":
        grey = 0.2989 * x[0] + 0.587 * x[1] + 0.114 * x[2]
        return v * x + (1 - v) * grey
    if name == "brightness":
        return v * x
    if name == "sharpness":
        p = F.pad(x[None], (1, 1, 1, 1), mode="replicate")[0]
        h, w = x.shape[1:]
        around = sum(p[:, i : i + h, j : j + w] for i in range(3) for j in range(3)) + 4 * x
        return v * x + (1 - v) * around / 13
    through = x - x.detach() + v - v.detach()
    if name == "autocontrast":
        return TF.autocontrast(x.detach()) + through
    if name == "invert":
        return 1 - x + v - v.detach()
    if name == "solarize":
        return torch.where(x < v, x, 1 - x) + through
    eight = (255 * x.detach()).to(torch.uint8)
    if name == "equalize":
        return TF.equalize(eight).to(x.dtype) / 255 + through
    return TF.posterize(eight, int(v)).to(x.dtype) / 255 + through


class Tesla:
    def __init__(self, model, *, lr, mu, view, n, r, lam1, lam2, queue, near, generator) -> None:
        self.student = copy.deepcopy(model).train()
        self.student.drop.eval()
        self.student.head.requires_grad_(False)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        learnt = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(learnt, lr=lr)
        self.mu, self.view, self.n, self.lam1, self.lam2 = mu, view, n, lam1, lam2
        self.policies = list(itertools.combinations(RANGES, r))
        kind = {"dtype": learnt[0].dtype, "requires_grad": True}
        self.w = torch.zeros(len(self.policies), **kind)
        self.m = torch.zeros(len(self.policies), r, **kind)
        self.policy = torch.optim.Adam([self.w, self.m], lr=0.1)
        self.size, self.near, self.generator = queue, near, generator
        self.queues: list[list] = [[] for _ in range(5)]
        self.features: list[Tensor] = []
        self.teacher.head.register_forward_hook(lambda _, a, __: self.features.append(a[0]))
        self.levels: list[Tensor] = []
        for norm in (self.teacher.norm1, self.teacher.norm2):
            norm.register_forward_hook(lambda _, a, __: self.levels.append(a[0].mean((2, 3))))

    def harder(self, x: Tensor, chosen: list[int]) -> Tensor:
        flips = torch.rand(len(x), self.m.shape[1], generator=self.generator) < 0.5
        images = []
        for i, k in enumerate(chosen):
            image = x[i]
            for j, name in enumerate(self.policies[k]):
                low, high = RANGES[name]
                v = low + self.m[k, j].sigmoid() * (high - low)
                if name in SIGNED and flips[i, j]:
                    v = -v
                image = change(image.clamp(0, 1), name, v).clamp(0, 1)
            images.append(image)
        return torch.stack(images)

    def __call__(self, x: Tensor) -> Tensor:
        views = [x] + [self.view(x) for _ in range(self.n)]
        shown = views[int(torch.randint(len(views), (), generator=self.generator))]
        self.levels.clear()
        self.teacher(shown)
        plain = list(self.levels)
        k = torch.randint(len(self.policies), (len(x),), generator=self.generator)
        self.levels.clear()
        p = self.teacher(self.harder(shown, k.tolist())).softmax(1)
        moved = [(a - b).square().mean(1) for a, b in zip(self.levels, plain, strict=True)]
        loss = (p * p.log()).sum(1) + self.lam1 * sum(moved) / len(moved)
        self.policy.zero_grad()
        (loss.mean() + (loss.detach() * self.w.softmax(0)[k].log()).mean()).backward()
        self.policy.step()
        with torch.no_grad():
            k = torch.multinomial(
                self.w.softmax(0), len(x), replacement=True, generator=self.generator
            )
            hard = self.harder(shown, k.tolist())
        self.features.clear()
        t = torch.stack([self.teacher(view).softmax(1) for view in reversed(views)]).mean(0)
        f = torch.stack(self.features).mean(0)
        if self.size:
            for feature, probs in zip(f, t, strict=True):
                own = self.queues[int(probs.argmax())]
                own.append((feature, probs))
                del own[: -self.size]
            held = [item for own in self.queues for item in own]
            cosine = F.cosine_similarity(f[:, None], torch.stack([h[0] for h in held])[None], dim=2)
            nearest = cosine.topk(min(self.near, len(held)), dim=1).indices
            t = torch.stack([torch.stack([held[j][1] for j in row]).mean(0) for row in nearest])
        s = self.student(shown).softmax(1)
        mean = s.mean(0)
        loss = -(s * t.log()).sum(1).mean() + (mean * mean.log()).sum()
        q = self.student(hard).log_softmax(1)
        loss = loss + self.lam2 * F.kl_div(q, t, reduction="batchmean")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
            for a, b in pairs:
                a.copy_(self.mu * a + (1 - self.mu) * b)
            self.teacher.eval()
            answer = self.teacher(x)
            self.teacher.train()
            self.teacher.drop.eval()
        return answer
