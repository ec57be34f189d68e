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


class PublishedBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(planes),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class PublishedResNet(nn.Module):
    """ResNet-34 with num_blocks (3, 4, 6, 3), ResNet-18 with (2, 2, 2, 2), for 3x32x32 images."""

    def __init__(self, num_blocks: tuple[int, int, int, int], num_classes: int = 10):
        super().__init__()
        self.in_planes = 64
        self.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = self._make_layer(64, num_blocks[0], 1)
        self.layer2 = self._make_layer(128, num_blocks[1], 2)
        self.layer3 = self._make_layer(256, num_blocks[2], 2)
        self.layer4 = self._make_layer(512, num_blocks[3], 2)
        self.linear = nn.Linear(512, num_classes)

    def _make_layer(self, planes: int, num_blocks: int, stride: int) -> nn.Sequential:
        strides = [stride] + [1] * (num_blocks - 1)
        layers = []
        for s in strides:
            layers.append(PublishedBlock(self.in_planes, planes, s))
            self.in_planes = planes
        return nn.Sequential(*layers)

    def forward(self, x: Tensor, out_feature: bool = False):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        feature = F.avg_pool2d(x, 4).view(x.size(0), -1)
        x = self.linear(feature)
        return (x, feature) if out_feature else x


# What the published code sets for CIFAR; the generator has latent_dim 1000 and 3 channels there.
# (The student's learning rate falls to a tenth at epochs 800 and 1600 of 2000.)
CIFAR10 = dict(oh=0.05, ie=5.0, a=0.01, lr_g=0.02, lr_s=0.1, sgd=True)
CIFAR100 = {**CIFAR10, "oh": 0.5, "ie": 20.0, "a": 0.1}


class PublishedStep:
    """One iteration of DAFL-train.py: the teacher in eval mode but not frozen.

    The defaults are those for MNIST; `PublishedStep(g, t, s, **CIFAR10)` is the step for CIFAR-10.
    """

    def __init__(
        self, generator: nn.Module, teacher: nn.Module, student: nn.Module,
        oh: float = 1.0, ie: float = 5.0, a: float = 0.1, lr_g: float = 0.2, lr_s: float = 2e-3,
        sgd: bool = False,
    ):  # fmt: skip
        self.generator, self.teacher, self.student = generator, teacher.eval(), student
        self.oh, self.ie, self.a = oh, ie, a
        self.optimizer_g = torch.optim.Adam(generator.parameters(), lr=lr_g)
        if sgd:
            self.optimizer_s = torch.optim.SGD(
                student.parameters(), lr=lr_s, momentum=0.9, weight_decay=5e-4
            )
        else:
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
