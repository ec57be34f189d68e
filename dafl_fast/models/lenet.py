"""LeNet-5 and LeNet-5-Half as in the published DAFL code: 1x32x32 images, ten classes."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import conv_pool, whole_image_conv


class LeNet5(nn.Module):
    """[N, 1, 32, 32] -> logits [N, num_classes]; the features are the 120 inputs of `fc1`.

    It has 61,706 parameters with the default widths.
    """

    feature_layer = "fc1"  # where FrozenTeacher takes the features

    def __init__(
        self, widths: tuple[int, int, int, int] = (6, 16, 120, 84), num_classes: int = 10
    ) -> None:
        super().__init__()
        c1, c2, c3, hidden = widths
        self.conv1 = nn.Conv2d(1, c1, 5)
        self.conv2 = nn.Conv2d(c1, c2, 5)
        self.conv3 = nn.Conv2d(c2, c3, 5)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU()
        self.fc1 = nn.Linear(c3, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = conv_pool(conv_pool(x, self.conv1), self.conv2)
        features = self.relu(whole_image_conv(x, self.conv3))
        return self.fc2(self.relu(self.fc1(features)))


class LeNet5Half(LeNet5):
    """LeNet-5 with half the widths (3, 8, 60, 42): the published MNIST student, 15,738 weights."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__((3, 8, 60, 42), num_classes)
