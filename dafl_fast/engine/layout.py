"""In which order do a network's pixels lie in memory? Convolutions are faster with channels last.

Code that was written for contiguous images may not run on others: `x.view(len(x), -1)` is the
commonest line of all. So a network is tried, forward and backward, and gets contiguous activations
where it needs them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from ..errors import UserError, first_line
from ..models.twin import duplicate
from .evaluation import evaluation_mode, modes_kept, training_mode

log = logging.getLogger(__name__)

# A network that needs more of them gets contiguous inputs and weights as a whole.
_MOST_PLACES = 8
# The largest number of channels that oneDNN handles together.
_ONEDNN_BLOCK = 16


def use_channels_last(network: nn.Module, inputs: Tensor, role: str, trained: bool = False) -> None:
    """Brings `network` into channels_last if it then runs, and answers as before.

    If its code asks for contiguous activations, hooks make the outputs of some layers contiguous.
    If that is not enough, all stays contiguous, the inputs too, and a warning is logged.
    A network that writes into its inputs gets copies, as others read them too. `layout_kept` takes
    all of this back.

    Args:
        inputs: a batch of its inputs.
        role: names the network in messages.
        trained: whether it will be trained, and must therefore run in training mode too.

    Raises:
        UserError: it does not run forward and backward, however its inputs lie in memory.
    """
    try:
        expected = try_out(network, inputs.contiguous(), trained)
    except Exception as error:  # a network may raise anything
        raise UserError(
            f"the {role} does not run forward and backward on a batch of shape "
            f"{list(inputs.shape)}: {first_line(error)}"
        ) from error
    if _writes_into(network, inputs):
        _copy_inputs_of(network)
    before = _strides(network)
    for tensor in _weights(network).values():  # module.to() refuses weights of five dimensions
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    if trained and inputs.device.type == "cpu":
        _keep_from_corruption(network)
    if inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    places: set[nn.Module] = set()
    while len(places) <= _MOST_PLACES:
        finished: list[nn.Module] = []
        try:
            # torch.fx prints what its modules raise.
            with _noting_scattered_outputs(network, finished), redirect_stderr(StringIO()):
                got = try_out(network, inputs, trained)
        except Exception:  # whatever its code says of such activations
            # The layer before the code that failed, most probably.
            place = next((layer for layer in reversed(finished) if layer not in places), None)
            if place is not None:
                place.register_forward_hook(_contiguous_output)
                places.add(place)
            elif network not in places:
                _demand_contiguous_inputs(network)
                places.add(network)
            else:
                break
        else:
            if not _near(got, expected):
                break
            return
    _remove_hooks(network, _CONTIGUOUS)
    _restore(network, before)
    _demand_contiguous_inputs(network)
    log.warning(
        "the %s runs on contiguous activations only, which makes its convolutions slower; look for "
        "view() in its code, where flatten() or reshape() does the same",
        role,
    )


def copying_inputs(network: nn.Module, inputs: Tensor) -> nn.Module:
    """`network`, or a copy of it that gets copies of its inputs if it writes into them."""
    with contextlib.suppress(Exception):  # whatever is wrong with it is said elsewhere
        if _writes_into(network, inputs):
            network = duplicate(network)
            _copy_inputs_of(network)
    return network


@contextlib.contextmanager
def layout_kept(network: nn.Module) -> Iterator[None]:
    """Afterwards the weights of `network` lie in memory as they do now, and it has no hooks of
    `use_channels_last`."""
    before = _strides(network)
    try:
        yield
    finally:
        _remove_hooks(network, (*_CONTIGUOUS, _copied_inputs))
        _restore(network, before)


def try_out(network: nn.Module, inputs: Tensor, trained: bool = False) -> list[Tensor]:
    """Runs `network` forward and backward, in evaluation mode and, if it is `trained`, in training
    mode too, and leaves it as it was. Returns its outputs in evaluation mode. Random numbers are
    the same in every call."""
    answers: list[Tensor] = []
    with _unchanged(network, inputs.device), torch.enable_grad():
        for training in (False, True)[: 1 + trained]:
            with modes_kept(network) if training else evaluation_mode(network):
                if training:
                    training_mode(network)
                # No leaf, which a network that writes into its inputs could not take.
                outputs = _tensors(network(inputs.detach().clone().requires_grad_().clone()))
                losses = [y.float().square().mean() for y in outputs if y.requires_grad]
                if losses:
                    torch.stack(losses).sum().backward()
                elif training:
                    raise ValueError(
                        "its outputs have no gradient; look for torch.no_grad() or detach() in its "
                        "forward"
                    )
                if not training:
                    answers = [y.detach() for y in outputs]
    return answers


@torch.no_grad()
def _writes_into(network: nn.Module, inputs: Tensor) -> bool:
    given = inputs.detach().clone()
    version = given._version
    with _unchanged(network, inputs.device), evaluation_mode(network):
        network(given)
    return given._version != version


def _tensors(outputs: Any) -> list[Tensor]:
    leaves = tree_leaves(vars(outputs) if hasattr(outputs, "__dataclass_fields__") else outputs)
    return [y for y in leaves if isinstance(y, Tensor) and y.is_floating_point()]


def _near(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and all(
        a.shape == b.shape
        and torch.allclose(a, b, 1e-3, 1e-3 * b.abs().nan_to_num().amax().item(), True)
        for a, b in zip(got, expected)
    )


@contextlib.contextmanager
def _unchanged(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts back the buffers, attributes, gradients and random numbers that a run changes."""
    layers = [m for m in network.modules() if not isinstance(m, torch.jit.ScriptModule)]
    attributes = [(layer, dict(vars(layer))) for layer in layers]
    owners = [
        (layer, name, buffer)
        for layer in network.modules()
        for name, buffer in layer.named_buffers(recurse=False)
    ]
    copies = [buffer.detach().clone() for _, _, buffer in owners]
    gradients = [(parameter, parameter.grad) for parameter in network.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for (layer, name, buffer), copied in zip(owners, copies):
            buffer.data = copied  # not copy_(): some layers change a buffer's shape
            if not isinstance(layer, torch.jit.ScriptModule):
                layer._buffers[name] = buffer
        for layer, before in attributes:
            vars(layer).clear()
            vars(layer).update(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextlib.contextmanager
def _noting_scattered_outputs(network: nn.Module, finished: list[nn.Module]) -> Iterator[None]:
    """Adds to `finished` each layer of `network` that returns an image that is not contiguous."""
    layers = set(network.modules())

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        scattered = isinstance(output, Tensor) and not output.is_contiguous()
        if scattered and layer in layers and not isinstance(layer, torch.jit.ScriptModule):
            finished.append(layer)

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _contiguous_output(layer: nn.Module, inputs: Any, output: Any) -> Any:
    return output.contiguous() if isinstance(output, Tensor) else output


def _keep_from_corruption(network: nn.Module) -> None:
    """Leaves strided 1x1 convolutions of few channels contiguous, with their inputs. With channels
    last, oneDNN writes beyond its memory when it computes the gradient to their weights in fp32:
    github.com/uxlfoundation/oneDNN/issues/6035, seen in PyTorch 2.14 with AVX2 and AVX-512."""
    for layer in network.modules():
        if (
            isinstance(layer, nn.Conv2d)
            and layer.kernel_size == (1, 1)
            and layer.stride != (1, 1)
            and layer.in_channels // layer.groups < _ONEDNN_BLOCK
        ):
            # Not contiguous(), for which a 1x1 kernel is that in any order.
            weight = layer.weight.detach()
            layer.weight.data = torch.empty(weight.shape, dtype=weight.dtype).copy_(weight)
            layer.register_forward_pre_hook(_contiguous_inputs)


def _demand_contiguous_inputs(network: nn.Module) -> None:
    # Not register_forward_pre_hook(), which TorchScript does not have, though it runs the hooks.
    network._forward_pre_hooks[id(network)] = _contiguous_inputs


def _contiguous_inputs(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in inputs)


def _copy_inputs_of(network: nn.Module) -> None:
    network._forward_pre_hooks[id(_copied_inputs)] = _copied_inputs


def _copied_inputs(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)


def _remove_hooks(network: nn.Module, which: tuple[Any, ...]) -> None:
    for layer in network.modules():
        for hooks in (layer._forward_hooks, layer._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook in which]:
                del hooks[key]


_CONTIGUOUS = (_contiguous_output, _contiguous_inputs)


def _weights(network: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if not is_lazy(tensor)}


def _strides(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tensor.stride() for name, tensor in _weights(network).items()}


@torch.no_grad()
def _restore(network: nn.Module, strides: dict[str, tuple[int, ...]]) -> None:
    for name, tensor in _weights(network).items():
        if tensor.dim() == 4:
            wanted = strides.get(name) or tensor.contiguous().stride()  # lazy ones had none
            if tensor.stride() != wanted:
                there = torch.empty_strided(
                    tensor.shape, wanted, dtype=tensor.dtype, device=tensor.device
                )
                tensor.data = there.copy_(tensor)
