"""Networks with weights in fp16, bf16 or fp64, which are computed in the precision of their images.

Low precision is a matter of training here (autocast), and not of how a network was stored.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from ..device import AUTOCAST
from ..errors import UserError
from ..models.twin import duplicate
from .evaluation import evaluation_mode

log = logging.getLogger(__name__)

_LOW = (torch.float16, torch.bfloat16)


def computed_in(dtype: torch.dtype, network: nn.Module, role: str, *examples: Tensor) -> nn.Module:
    """`network`, if it takes images of `dtype`; else a copy of it whose weights are of that dtype.

    A network that casts its images itself is left alone. In programs of torch.export the casts are
    changed as well. Weights that were made under torch.inference_mode() are copied, as autograd
    refuses them.

    Args:
        network: left as it is.
        role: names it in messages ("teacher").
        examples: a batch of images [N, C, H, W] of `dtype` for each size that it may be for.

    Raises:
        UserError: it computes in another precision than its weights', or cannot be copied.
    """
    tensors = [*network.parameters(), *network.buffers()]
    if any(not is_lazy(tensor) and tensor.is_inference() for tensor in tensors):
        network = duplicate(network)
    kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    constant = isinstance(network, torch.jit.ScriptModule) and not kinds  # a frozen one
    kinds -= {dtype}
    if not (kinds or constant) or _takes(network, *examples):
        return network
    copied = duplicate(network)
    _convert(copied, kinds, dtype)
    name = _name(dtype)
    if _takes(copied, *examples):
        own = " and ".join(sorted(map(_name, kinds)))
        log.warning("the %s's weights are %s; it is computed in %s", role, own, name)
        return copied
    for other in (*_LOW, torch.float64):
        if _takes(network, *(images.to(other) for images in examples)):
            raise UserError(
                f"the {role} takes images in {_name(other)} only, and its code or constants keep "
                f"it from being computed in {name}; give it in {name}, by network.float() before "
                "it is exported or traced"
            )
    return copied  # it takes none of the images, for another reason, which checks.py tells


def check_trainable(network: nn.Module, role: str, inputs: Tensor) -> None:
    """Raises UserError unless the weights of `network`, which takes such inputs, can be trained:
    some of them want a gradient, and they are float32, or what it casts its inputs to."""
    if any(tensor.is_inference() for tensor in (*network.parameters(), *network.buffers())):
        raise UserError(
            f"the {role} was made under torch.inference_mode(), and its weights cannot be trained; "
            "make it outside of that"
        )
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(
            f"the {role} has nothing to train: none of its parameters has requires_grad=True"
        )
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"the {role} cannot be saved: {name} in its state is {type(value).__name__}, no "
                "tensor; leave get_extra_state out"
            )
    wide = any(p.dtype == torch.float64 for p in network.parameters())
    wide = wide and not _takes(network, inputs)
    for name, parameter in network.named_parameters():
        narrow = parameter.dtype in _LOW
        if narrow or (wide and parameter.dtype == torch.float64):
            advice = ", and set precision to compute in less" if narrow else ""
            raise UserError(
                f"the {role}'s weights must be float32 to be trained, got {_name(parameter.dtype)} "
                f"for {name}; give {role}.float(){advice}"
            )


def precision_of(student: nn.Module, wanted: str, picked: str) -> str:
    """The precision to train in: `picked` for the setting `wanted`, but fp32 for a student that is
    prepared for quantisation. PyTorch simulates quantisation in fp32 only.

    Raises:
        UserError: another precision was set.
    """
    if picked not in AUTOCAST or not any(
        hasattr(layer, "fake_quant_enabled") for layer in student.modules()
    ):
        return picked
    if wanted != "auto":
        raise UserError(
            "precision must be fp32 for a student that is prepared for quantisation, which PyTorch "
            f"simulates in float32 only, got {wanted}"
        )
    log.warning("the student is prepared for quantisation: all is computed in float32")
    return "fp32"


def _convert(network: nn.Module, kinds: set[torch.dtype], dtype: torch.dtype) -> None:
    def changed(value: Any) -> Any:
        return dtype if isinstance(value, torch.dtype) and value in kinds else value

    for parameter in network.parameters():
        parameter.detach_()  # those of a copied TorchScript hang on what they were copied from
    network.to(dtype)
    for part in network.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.args = fx.node.map_aggregate(node.args, changed)
                node.kwargs = fx.node.map_aggregate(node.kwargs, changed)
            part.recompile()


@torch.no_grad()
def _takes(network: nn.Module, *examples: Tensor) -> bool:
    """Whether a network can compute one of `examples`."""
    device = next(network.parameters(), torch.empty(0)).device
    for images in examples:
        try:
            with evaluation_mode(network):
                network(images.to(device))
            return True
        except Exception:  # whatever a network says of images that it does not take
            continue
    return False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
