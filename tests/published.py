"""The published algorithm in plain PyTorch, written from its description alone.

An independent witness: nothing here comes from `dafl_fast`. The tests hold one training step
against it; the benchmarks take it as the baseline that users have today.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PublishedGenerator(nn.Module):
    def __init__(self, latent_dim: int = 100, width: int = 128, size: int = 32, channels: int = 1):
        super().__init__()
        self.width, self.start = width, size // 4
        self.l1 = nn.Sequential(nn.Linear(latent_dim, width * self.start**2))
        self.conv_blocks0 = nn.Sequential(nn.BatchNorm2d(width))
        self.conv_blocks1 = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=1, padding=1),
            nn.BatchNorm2d(width, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
        )
        self.conv_blocks2 = nn.Sequential(
            nn.Conv2d(width, width // 2, 3, stride=1, padding=1),
            nn.BatchNorm2d(width // 2, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width // 2, channels, 3, stride=1, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, z: Tensor) -> Tensor:
        img = self.l1(z).view(z.shape[0], self.width, self.start, self.start)
        img = self.conv_blocks0(img)
        img = self.conv_blocks1(F.interpolate(img, scale_factor=2))
        return self.conv_blocks2(F.interpolate(img, scale_factor=2))


class PublishedLeNet5(nn.Module):
    def __init__(self, c1: int = 6, c2: int = 16, c3: int = 120, hidden: int = 84):
        super().__init__()
        self.conv1 = nn.Conv2d(1, c1, kernel_size=5)
        self.conv2 = nn.Conv2d(c1, c2, kernel_size=5)
        self.conv3 = nn.Conv2d(c2, c3, kernel_size=5)
        self.fc1 = nn.Linear(c3, hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, img: Tensor, out_feature: bool = False):
        output = F.max_pool2d(F.relu(self.conv1(img)), 2, stride=2)
        output = F.max_pool2d(F.relu(self.conv2(output)), 2, stride=2)
        output = F.relu(self.conv3(output))
        feature = output.view(-1, output.shape[1])
        output = self.fc2(F.relu(self.fc1(feature)))
        return (output, feature) if out_feature else output


class PublishedStep:
    """One iteration of DAFL-train.py for MNIST: the teacher in eval mode but not frozen."""

    def __init__(
        self, generator: nn.Module, teacher: nn.Module, student: nn.Module,
        oh: float = 1.0, ie: float = 5.0, a: float = 0.1, lr_g: float = 0.2, lr_s: float = 2e-3,
    ):  # fmt: skip
        self.generator, self.teacher, self.student = generator, teacher.eval(), student
        self.oh, self.ie, self.a = oh, ie, a
        self.optimizer_g = torch.optim.Adam(generator.parameters(), lr=lr_g)
        self.optimizer_s = torch.optim.Adam(student.parameters(), lr=lr_s)

    def __call__(self, z: Tensor) -> None:
        self.optimizer_g.zero_grad()
        self.optimizer_s.zero_grad()
        gen_imgs = self.generator(z)
        outputs_t, features_t = self.teacher(gen_imgs, out_feature=True)
        pred = outputs_t.data.max(1)[1]
        loss_activation = -features_t.abs().mean()
        loss_one_hot = F.cross_entropy(outputs_t, pred)
        softmax_t = F.softmax(outputs_t, dim=1).mean(dim=0)
        loss_entropy = (softmax_t * torch.log10(softmax_t)).sum()
        loss = loss_one_hot * self.oh + loss_entropy * self.ie + loss_activation * self.a
        log_p = F.log_softmax(self.student(gen_imgs.detach()), dim=1)
        q = F.softmax(outputs_t.detach(), dim=1)
        loss = loss + F.kl_div(log_p, q, reduction="sum") / len(z)
        loss.backward()
        self.optimizer_g.step()
        self.optimizer_s.step()
