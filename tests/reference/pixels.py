"""CoTTA for segmentation once more, from the paper: copies of the whole model, torchvision, loops."""

import copy

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from reference.methods import configured


class CottaOfPixels:
    """Without restoration. Sides of scaled images are rounded up to multiples of `step`."""

    def __init__(self, model: nn.Module, lr: float, m: float, p_th: float, step: int) -> None:
        self.student, _ = configured(model)
        self.student.requires_grad_(True)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.source = copy.deepcopy(self.teacher)
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=lr)
        self.m, self.p_th, self.step = m, p_th, step

    def averaged(self, x: Tensor) -> Tensor:
        """Mean probability of each pixel over seven scales, each plain and mirrored."""
        ps = []
        for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0):
            size = [-(-int(side * scale) // self.step) * self.step for side in x.shape[-2:]]
            view = TF.resize(x, size, antialias=False)
            for z in (self.teacher(view), TF.hflip(self.teacher(TF.hflip(view)))):
                ps.append(TF.resize(z, list(self.shape[-2:]), antialias=False).softmax(1))
        return torch.stack(ps).mean(0)

    def __call__(self, x: Tensor) -> Tensor:
        """The probabilities (B, C, H, W) that are answered."""
        z = self.student(x)
        self.shape = z.shape
        sure = self.source(x).softmax(1).amax(1, keepdim=True) >= self.p_th
        self.sure = float(sure.float().mean())
        p = torch.where(sure, self.teacher(x).softmax(1), self.averaged(x))
        loss = -(p * z.log_softmax(1)).sum(1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for a, b in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                a.copy_(self.m * a + (1 - self.m) * b)
        return p
