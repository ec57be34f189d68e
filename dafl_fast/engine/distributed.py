"""Training in several processes that together do what one process would do.

With torchrun, each process trains on its share of each batch. Every mean over the batch is taken
over all processes: gradients (by DistributedDataParallel), BatchNorm's statistics (here) and the
generator loss's mean prediction (in `dafl_fast.losses`). So the result does not depend on the
number of processes, except for rounding.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..device import told_by_torchrun
from ..errors import TrainingStopped, UserError, first_line
from ..models.twin import twin

log = logging.getLogger(__name__)
T = TypeVar("T")

# PyTorch 2.14 renamed this option.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


class World:
    """The processes of this job. Without torchrun there is only one, and each method is trivial."""

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        own: bool = False,
        control: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self._own = own  # whether we made the process group, and must end it
        self._control = control  # for what is on the CPU; by default the group for everything

    @classmethod
    def join(cls, device: torch.device) -> World:
        """Joins the processes that torchrun started, or those of a process group that the caller
        has made already. Without either, there is one process.

        Raises:
            UserError: the processes do not find each other.
        """
        if dist.is_available() and dist.is_initialized():
            size = dist.get_world_size()
            # The caller's group may be for tensors on GPUs only.
            control: Any = dist.new_group(backend="gloo") if size > 1 else None
            return cls(dist.get_rank(), size, control=control)
        if told_by_torchrun("WORLD_SIZE", 1) == 1:
            return cls()
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the processes do not find each other: {first_line(error)}; start them with "
                "torchrun, or unset WORLD_SIZE to train in one process"
            ) from error
        return cls(dist.get_rank(), dist.get_world_size(), own=True)

    def leave(self) -> None:
        """Ends the process groups that `join` made, at the end of a run."""
        if self._own:
            dist.destroy_process_group()
        elif self._control is not None:
            dist.destroy_process_group(self._control)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All processes, for collective calls; None when there is only one."""
        return dist.group.WORLD if self.size > 1 else None

    def rows_of_batch(self, name: str, count: int) -> slice:
        """This process's rows of a batch of `count`; `name` is the option that sets this size."""
        if count % self.size or count // self.size < 2:
            raise UserError(
                f"--{name} must be a multiple of the number of processes, {self.size}, with at "
                f"least two images for each, got {count}"
            )
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean of `tensor` over the processes; differentiable."""
        if self.size == 1:
            return tensor
        return _MeanOverProcesses.apply(tensor, self.group)  # type: ignore[no-any-return]

    def gather(self, tensor: Tensor) -> Tensor:
        """The whole batch, put together from the share [n, ...] of each process."""
        if self.size == 1:
            return tensor
        # As bytes, because gloo does not support all dtypes.
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        parts = [torch.empty_like(raw) for _ in range(self.size)]
        dist.all_gather(parts, raw)
        return torch.cat(parts).view(tensor.dtype).view(-1, *tensor.shape[1:])

    def gather_differentiably(self, tensor: Tensor) -> Tensor:
        """As `gather`; the gradient of what every process computes alike from the whole batch."""
        if self.size == 1:
            return tensor
        return _Gathered.apply(tensor, self)  # type: ignore[no-any-return]

    def all_reduce_max(self, *values: float) -> list[float]:
        """The largest of each value over all processes. Their clocks and signals differ, but they
        must decide alike."""
        if self.size == 1:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self._control)
        said: list[float] = agreed.tolist()
        return said

    def decide(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, in every process; also if it is a UserError."""
        if self.size == 1:
            return make()
        said: list[Any] = [None, None]
        if self.first:
            try:
                said[0] = make()
            except UserError as error:
                said[1] = str(error)
        dist.broadcast_object_list(said, 0, group=self._control)
        if said[1] is not None:
            raise UserError(said[1])
        decided: T = said[0]
        return decided

    def demand_equal(self, values: dict[str, Any]) -> None:
        """Raises UserError, in every process, unless all have the same values; it names the first
        that differs."""
        if self.size == 1:
            return
        said: list[dict[str, Any]] = [{}] * self.size
        dist.all_gather_object(said, values, group=self._control)
        for name, first in said[0].items():
            for rank, other in enumerate(said):
                if other.get(name) != first:
                    raise UserError(
                        f"{name} must be the same in all processes, got {first!r} in process 0 and "
                        f"{other.get(name)!r} in process {rank}"
                    )

    @contextlib.contextmanager
    def in_contact(self) -> Iterator[None]:
        """Raises TrainingStopped in place of what a collective call raises if another process has
        ended, whose own message says why."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not is_lost_contact(error):
                raise
            raise TrainingStopped(
                f"process {self.rank} of {self.size} has lost contact with another one, which has "
                "ended"
            ) from error

    def share_statistics(self, network: nn.Module, role: str) -> nn.Module:
        """`network`, if there is one process. Otherwise a twin with the same parameters and
        buffers, whose BatchNorm takes its statistics over the batches of all processes. Classes
        derived from BatchNorm may compute anything, so they keep theirs, which a line says."""
        if self.size == 1:
            return network
        own = set()
        for layer in network.modules():
            if type(layer) in _SHARED and getattr(layer, "momentum", None) is None:
                raise UserError(
                    f"the {role}'s BatchNorm layers need a momentum to train in several "
                    "processes, got None"
                )
            known = (*_SHARED, nn.SyncBatchNorm)
            if isinstance(layer, _BatchNorm) and layer.training and type(layer) not in known:
                own.add(type(layer).__name__)
        if own and self.first:
            log.warning(
                "the %s's layers of the class %s take the statistics of each process's share of "
                "the batch, and the first process's are kept", role, ", ".join(sorted(own)),
            )  # fmt: skip
        return twin(network, lambda layer: _SHARED.get(type(layer)))

    def average_gradients(self, network: nn.Module) -> nn.Module:
        """`network`, with its gradients averaged over the processes."""
        if self.size == 1:
            return network
        # Buffers are equal, or each process's own (see `share_statistics`). The graph is static: a
        # parameter that gets no gradient, such as a bias before BatchNorm, never gets one.
        options: dict[str, Any] = {"static_graph": True, _SYNC_BUFFERS: False}
        return DistributedDataParallel(network, **options)


def is_lost_contact(error: RuntimeError) -> bool:
    """Whether a collective call failed because another process has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class _MeanOverProcesses(torch.autograd.Function):
    """The mean over all processes; its gradient is the mean of their gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _mean(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _mean(grad, ctx.group), None


class _Gathered(torch.autograd.Function):
    """The whole batch; its gradient is that of this process's rows, times the number of processes,
    because the gradients of the parameters are averaged over them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: World) -> Tensor:
        ctx.world, ctx.count = world, len(tensor)
        return world.gather(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        start = ctx.world.rank * ctx.count
        return grad[start : start + ctx.count] * ctx.world.size, None


def _mean(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    mean = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(mean, group=group)
    return mean.div_(group.size())


class _SharedStatistics(_BatchNorm):
    """BatchNorm with the statistics of all processes' batches, which are of equal size.

    torch's SyncBatchNorm does the same, but on GPUs only.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.momentum is not None
        world = World(dist.get_rank(), dist.get_world_size())
        values = x if x.dtype == torch.float64 else x.float()
        across = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        mean = world.mean(values.mean(across))
        centred = values - mean.view(shape)
        variance = world.mean(centred.square().mean(across))
        if self.running_mean is not None and self.running_var is not None:
            count = world.size * x.numel() // x.shape[1]
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                unbiased = variance * (count / max(count - 1, 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class _SharedBatchNorm1d(_SharedStatistics, nn.BatchNorm1d):
    pass


class _SharedBatchNorm2d(_SharedStatistics, nn.BatchNorm2d):
    pass


_SHARED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _SharedBatchNorm1d,
    nn.BatchNorm2d: _SharedBatchNorm2d,
}
