"""HintonNet, the two-hidden-layer perceptron pair of Hinton et al. 2015 that DAFL reports on."""

from __future__ import annotations

from torch import Tensor, nn


class HintonNet(nn.Module):
    """[N, 1, 28, 28] -> logits [N, num_classes] through two hidden layers.

    1,200 hidden units are the published teacher, 800 the published student.
    """

    def __init__(self, hidden: int = 1200, num_classes: int = 10, pixels: int = 784) -> None:
        super().__init__()
        self.fc1 = nn.Linear(pixels, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, num_classes)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.fc1(x.flatten(1)))
        return self.fc3(self.relu(self.fc2(x)))
