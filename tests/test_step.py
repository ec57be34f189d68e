"""The training step against an independent transcription, and what each recipe does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from dafl_fast.engine.distributed import World
from dafl_fast.engine.ema import Average
from dafl_fast.engine.step import STATISTICS, Step
from dafl_fast.engine.teacher import FrozenTeacher
from dafl_fast.models import Generator, LeNet5, LeNet5Half
from dafl_fast.models.pixels import GeneratorOf
from dafl_fast.recipes import make_config
from dafl_fast.unlabelled import Given

from .published import PublishedGenerator, PublishedLeNet5, PublishedStep

CPU = torch.device("cpu")


def make_step(
    recipe: str,
    dtype: torch.dtype = torch.float64,
    precision: str = "fp32",
    device: torch.device = CPU,
    world: World | None = None,
    given: Given | None = None,
    **overrides,
) -> Step:
    overrides = {"batch_size": 16, "generator_width": 8, "seed": 5, **overrides}
    config = make_config("mnist", recipe, **overrides)
    torch.manual_seed(1)
    generator = Generator(config.latent_dim, 32, 1, config.generator_width)
    teacher, student = LeNet5(), LeNet5Half()
    for module in (generator, teacher, student):
        module.to(device, dtype, memory_format=torch.channels_last)
    teacher = FrozenTeacher(teacher, "fc1")
    if config.from_generated is not None:
        generator = GeneratorOf(generator, *config.from_generated).to(device)
    return Step(config, generator, teacher, student, 10, device, precision, world, given)


def witness_of(step: Step) -> PublishedStep:
    """The transcription with the same initial weights."""
    dtype = step.dtype
    generator = PublishedGenerator(width=step.config.generator_width).to(dtype)
    teacher = PublishedLeNet5().to(dtype)
    student = PublishedLeNet5(3, 8, 60, 42).to(dtype)
    generator.load_state_dict(step.generator.state_dict())
    teacher.load_state_dict(step.teacher.network.state_dict())
    student.load_state_dict(step.student.state_dict())
    return PublishedStep(generator, teacher, student)


def noises(step: Step, count: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(step.config.seed)
    shape = (step.config.batch_size, step.config.latent_dim)
    return [torch.randn(shape, generator=draw, dtype=step.dtype) for _ in range(count)]


def assert_same_weights(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(
            tensor, other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_three_published_steps_equal_the_transcription():
    step = make_step("published")
    witness = witness_of(step)
    start = step.generator.state_dict()["l1.0.weight"].clone()
    for z in noises(step, 3):
        step()
        witness(z)
    assert_same_weights(step.generator, witness.generator, 1e-9)
    assert_same_weights(step.student, witness.student, 1e-9)
    assert (step.generator.l1[0].weight - start).abs().max() > 0.1, "nothing was learned"


def test_published_statistics_are_the_losses():
    step = make_step("published")
    witness = witness_of(step)
    (z,) = noises(step, 1)
    images = witness.generator(z)
    logits, features = witness.teacher(images, out_feature=True)
    p = logits.softmax(1).mean(0)
    expected = {
        "one_hot": torch.nn.functional.cross_entropy(logits, logits.argmax(1)),
        "entropy": (p * p.log10()).sum(),
        "activation": -features.abs().mean(),
        "distill_loss": torch.nn.functional.kl_div(
            witness.student(images).log_softmax(1), logits.softmax(1), reduction="batchmean"
        ),
        "agreement_training": (witness.student(images).argmax(1) == logits.argmax(1))
        .double()
        .mean(),
    }
    step()
    got = dict(zip(STATISTICS, step.statistics.tolist(), strict=True))
    for name, value in expected.items():
        assert got[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
    total = expected["one_hot"] + 5 * expected["entropy"] + 0.1 * expected["activation"]
    assert got["generator_loss"] == pytest.approx(total.item(), rel=1e-5)


def test_paper_recipe_teaches_on_fresh_images():
    step = make_step("paper")
    witness = witness_of(step)
    first, second = noises(step, 2)
    step()
    # Generator first, by itself; then images of a new z from the updated generator.
    witness.optimizer_s = torch.optim.SGD(witness.student.parameters(), lr=0.0)
    witness(first)
    assert_same_weights(step.generator.l1, witness.generator.l1, 1e-9)
    with torch.no_grad():
        images = witness.generator(second)
        logits = witness.teacher(images)
    witness.student.zero_grad()
    loss = torch.nn.functional.kl_div(
        witness.student(images).log_softmax(1), logits.softmax(1), reduction="batchmean"
    )
    loss.backward()
    torch.optim.Adam(witness.student.parameters(), lr=2e-3).step()
    assert_same_weights(step.student, witness.student, 1e-9)


def test_fast_recipe_updates_from_the_bank():
    step = make_step(
        "fast", torch.float32, student_updates=3, student_batch_size=8, bank_images=24,
        generator_restart_every=2, ema_decay=0.9,
    )  # fmt: skip
    step()
    assert step.bank is not None and len(step.bank) == 16
    torch.testing.assert_close(step.bank.logits[:16], step.newest[1])
    torch.testing.assert_close(
        step.bank.images[:16], step.newest[0].to(torch.bfloat16), rtol=0, atol=0
    )
    step()
    assert len(step.bank) == 24 and step.bank.added == 32
    torch.testing.assert_close(step.bank.logits[:8], step.newest[1][8:])
    assert step.student_optimizer.state[step.student.fc2.bias]["step"] == 6
    assert step.averaged_student is not step.student
    before = [p.clone() for p in step.generator.parameters()]
    step()  # a new generator: its first update starts from other weights and an empty Adam
    assert step.generator_optimizer.state[step.generator.l1[0].weight]["step"] == 1
    moved = (step.generator.l1[0].weight - before[0]).abs().mean()
    assert moved > 0.03, "the restarted generator is still the old one"


def test_teacher_stays_as_it_was():
    step = make_step("published")
    before = step.teacher.fingerprint()
    step()
    assert step.teacher.fingerprint() == before
    assert all(p.grad is None for p in step.teacher.parameters())
    assert not step.teacher.network.training
    step.teacher.train()
    assert not step.teacher.network.training


def test_state_dict_restores_the_run_exactly():
    settings = dict(student_updates=2, student_batch_size=8, bank_images=64, ema_decay=0.9)
    one = make_step("fast", torch.float32, generator_restart_every=3, **settings)
    for _ in range(2):
        one()
    two = make_step("fast", torch.float32, generator_restart_every=3, **settings)
    for parameter in two.student.parameters():
        parameter.data.zero_()
    two.load_state_dict(torch.load(_saved(one.state_dict()), weights_only=True))
    two.bank.restore(0, one.bank.span(0, one.bank.added))
    for _ in range(3):
        one()
        two()
    assert_same_weights(two.averaged_student, one.averaged_student, 0)
    assert_same_weights(two.generator, one.generator, 0)
    assert torch.equal(two.statistics, one.statistics)


def _saved(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_fp32(precision):
    exact = make_step("published", torch.float32, generator_lr=1e-3)
    mixed = make_step("published", torch.float32, precision, generator_lr=1e-3)
    for _ in range(5):
        exact()
        mixed()
    torch.testing.assert_close(mixed.statistics[:-1], exact.statistics[:-1], rtol=0.05, atol=0.05)
    # Agreement counts images: of the 5 x 16, a few lie so near a border that rounding decides.
    assert abs(mixed.statistics[-1] - exact.statistics[-1]) <= 4 / 16


def test_an_fp16_overflow_skips_the_update_and_halves_the_scale():
    step = make_step("published", torch.float32, "fp16", generator_lr=1e-3)
    step()
    before = [copy.deepcopy(network.state_dict()) for network in (step.generator, step.student)]
    for scaler in step.scalers:
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})
    step()  # gradients of that size do not fit fp16
    for scaler in step.scalers:
        assert scaler.get_scale() == 2.0**39
    for network, state in zip((step.generator, step.student), before, strict=True):
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, state[name]), name
    for scaler in step.scalers:
        scaler.load_state_dict({**scaler.state_dict(), "scale": 1024.0})
    step()
    for network, state in zip((step.generator, step.student), before, strict=True):
        moved = [not torch.equal(p, state[name]) for name, p in network.named_parameters()]
        assert sum(moved) >= len(moved) - 2  # biases before BatchNorm have no gradient


class Overflowing(nn.Module):
    """A teacher whose logits overflow for the first of its images in chosen calls."""

    def __init__(self, teacher: nn.Module, calls: set[int]) -> None:
        super().__init__()
        self.teacher, self.calls, self.count, self.watching = teacher, calls, 0, False

    def forward(self, images):
        logits, features = self.teacher(images)
        factor = torch.ones_like(logits[:, :1])
        factor[0] = float("inf") if self.count in self.calls else 1.0
        self.count += 1
        return logits * factor, features


def test_before_the_student_begins_only_the_bank_grows():
    step = make_step("fast", torch.float32, bank_images=64, student_batch_size=8, student_updates=2)
    kept = {name: copy.deepcopy(value) for name, value in step.state_dict().items()}
    for _ in range(3):
        step(learn=False)
    assert (step.steps, step.learned, step.bank.added) == (3, 0, 48)
    now = step.state_dict()
    for name in ("student", "average"):
        assert all(torch.equal(now[name][key], kept[name][key]) for key in kept[name])
    assert not any(value.any() for state in now["student_optimizer"].values()
                   for value in state.values())  # fmt: skip
    assert not torch.equal(now["generator"]["l1.0.weight"], kept["generator"]["l1.0.weight"])
    step(learn=True)
    assert step.learned == 1
    assert not torch.equal(now["student"]["fc2.weight"], kept["student"]["fc2.weight"])
    generator, student = step.statistics[:-2].clone(), step.statistics[-2:].clone()
    means = step.take_means(4, 1)
    assert torch.equal(means[:-2], generator / 4) and torch.equal(means[-2:], student)


@pytest.mark.parametrize("recipe", ["published", "fast"])
def test_an_fp16_overflow_in_the_forward_pass_is_left_out(recipe):
    values = []
    for calls in (set(), {1}):
        step = make_step(recipe, torch.float32, "fp16", bank_images=32)
        step.teacher = Overflowing(step.teacher, calls)
        step()
        first = step.statistics.clone()
        step()
        values.append(step.take_means(2, 2))
        assert not step.statistics.any() and not step.overflows.any()
    assert step.is_finite() and values[1].isfinite().all()
    one_hot = STATISTICS.index("one_hot")
    assert values[1][one_hot] == first[one_hot]  # the mean of the one step that has a value
    assert values[1][one_hot] != values[0][one_hot]
    if step.bank is not None:
        stored = step.bank.span(0, step.bank.added)
        assert all(tensor.isfinite().all() for tensor in stored.values())
        assert torch.equal(stored["logits"][16], stored["logits"][17])


def test_overflow_in_every_step_shows_as_nan():
    step = make_step("published", torch.float32, "fp16")
    step.teacher = Overflowing(step.teacher, {0, 1})
    step()
    step()
    assert step.take_means(2, 2)[0].isnan()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_seen(value):
    step = make_step("published", torch.float32)
    assert step.is_finite()
    with torch.no_grad():
        next(step.student.parameters()).view(-1)[0].fill_(1e38)  # its square overflows
    assert step.is_finite()
    with torch.no_grad():
        list(step.student.parameters())[-1].view(-1)[-1].fill_(value)
    assert not step.is_finite()


def test_the_average_measures_its_own_statistics():
    """Those of the last weights would not fit it: the mean of what a layer gets would be wrong."""
    torch.manual_seed(0)
    kept = nn.BatchNorm1d(2).double()
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), kept).double()
    x = torch.randn(50, 3, dtype=torch.float64)
    average = Average(network, 0.9, x)
    for k in range(200):
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(0.3 * torch.randn_like(weight))
        network(x)
        average.ramp(k, k)
        average.update(network)
        average.measure(x)
    before = average.module[1].running_mean.clone()
    for _ in range(200):
        average.ramp(1000, 1000)
        average.measure(x)
    assert not torch.allclose(before, average.module[1].running_mean, rtol=1e-3)
    hidden = average.module[0](x)
    wanted = dict(rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(average.module[1].running_mean, hidden.mean(0), **wanted)
    torch.testing.assert_close(average.module[1].running_var, hidden.var(0), **wanted)
    # In evaluation mode it normalises, then, as in training mode.
    normal = average.module[:2](x)
    torch.testing.assert_close(normal.mean(0), average.module[1].bias, **wanted)
    assert not any(layer.training for layer in average.module.modules())


def test_the_first_batch_that_is_measured_counts_in_full():
    network = nn.Sequential(nn.BatchNorm1d(2, momentum=0.3), nn.BatchNorm1d(2).eval())
    network[1].running_mean.fill_(5)
    x, y = torch.randn(8, 2), torch.randn(8, 2)
    average = Average(network, 0.9, x)
    average.ramp(0, 0)
    average.measure(x)
    torch.testing.assert_close(average.module[0].running_var, x.var(0))
    average.ramp(500, 500)
    average.measure(y)
    torch.testing.assert_close(average.module[0].running_mean, 0.95 * x.mean(0) + 0.05 * y.mean(0))
    # What is not trained stays as it is.
    assert average.module[1].running_mean.tolist() == [5.0, 5.0]
    assert network[0].momentum == 0.3 and network[0].num_batches_tracked == 0
    assert average.module[0].num_batches_tracked == 0


class Own(nn.BatchNorm1d):
    """Keeps its statistics in a way of its own."""

    def forward(self, x):
        if self.training:
            self.running_mean.lerp_(x.mean(0), 0.3)
        return x - self.running_mean


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.usual, self.twice, self.unused, self.still = (
            nn.BatchNorm1d(2, momentum=m) for m in (0.1, 0.1, 0.1, 0.0)
        )
        self.own = Own(2)

    def forward(self, x):
        x = self.own(self.twice(self.twice(self.usual(x)) + 3))
        return self.still(x) if not self.training else self.still(self.unused(x))


def test_statistics_that_cannot_be_measured_are_copied():
    torch.manual_seed(0)
    network, x = Odd(), torch.randn(9, 2) + 2
    average = Average(network, 0.9, x)
    assert average.layers == [average.module.usual]
    network(x)
    average.ramp(0, 0)
    average.update(network)
    average.measure(x)
    for name, buffer in network.named_buffers():
        mine = average.module.get_buffer(name)
        assert torch.equal(mine, buffer) == (
            name not in ("usual.running_mean", "usual.running_var")
        )
    assert not any(layer._forward_pre_hooks for layer in average.module.modules())


def test_the_average_copies_other_buffers():
    """A mask of -inf minus itself would be NaN."""
    network = nn.Linear(3, 2)
    network.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    network.register_buffer("count", torch.tensor(1))
    average = Average(network, 0.9)
    network.count.add_(1)
    average.update(network)
    assert average.module.mask.tolist() == [0.0, -math.inf] and average.module.count == 2


def test_students_with_sgd_follow_torch():
    step = make_step(
        "published", student_optimizer="sgd", student_lr=0.1, student_weight_decay=5e-4
    )
    witness = witness_of(step)
    witness.optimizer_s = torch.optim.SGD(
        witness.student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4
    )
    for z in noises(step, 3):
        step()
        witness(z)
    assert_same_weights(step.student, witness.student, 1e-9)


def test_learning_rates_written_between_steps_are_used():
    step = make_step("published")
    before = copy.deepcopy(step.student.state_dict())
    step.set_student_lr(0.0)
    step()
    assert_same_weights(step.student, _with(LeNet5Half().double(), before), 0)
    step.set_student_lr(1e-3)
    step()
    # Adam moves each weight by about the learning rate.
    moved = (step.student.fc2.weight - before["fc2.weight"]).abs()
    assert 5e-4 < moved.mean() < 2e-3


def test_the_average_forgets_the_start_and_then_moves_slowly():
    network = nn.Linear(2, 1, bias=False).double()
    average = Average(network, 0.95)
    expected = network.weight.detach().clone()
    for k in range(300):
        with torch.no_grad():
            network.weight.fill_(float(k))
        average.ramp(k, k)
        average.update(network)
        decay = min(0.95, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * k
        torch.testing.assert_close(average.module.weight, expected, rtol=1e-6, atol=1e-6)


def _with(network: nn.Module, state) -> nn.Module:
    network.load_state_dict(state)
    return network
