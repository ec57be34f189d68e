"""HintonNet, the perceptron with two hidden layers of Hinton et al. 2015, for which DAFL reports
results as a teacher and as a student."""

from __future__ import annotations

from torch import Tensor, nn


class HintonNet(nn.Module):
    """[N, 1, 28, 28] -> logits [N, num_classes] through two hidden layers.

    The published teacher has 1,200 hidden units per layer, the published student 800.
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
