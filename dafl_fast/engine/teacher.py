"""The fixed teacher: frozen, its BatchNorm folded, with its feature vector brought along."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
from collections import Counter
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import UserError, first_line
from ..losses import batch_norm_loss
from ..models.functional import with_moments
from .distributed import World

log = logging.getLogger(__name__)

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# With `_TRANSPOSED`: the layers that autocast runs in low precision, and that BatchNorm folds into.
_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


class FrozenTeacher(nn.Module):
    """Any classifier as the judge of generated images: images [N, C, H, W] -> (logits, features).

    A copy of the network is frozen, so the backward pass computes the gradient to the images and
    no weight gradients; the network that was given is not changed. The features [N, F] are the
    input of a layer, taken by a hook. They are None, and a warning is logged, when no layer is
    named and the network shows no linear layer: the loss then goes without its activation term.

    `network` is the copy: images -> logits.

    Args:
        network: the classifier; used in evaluation mode. It must return logits [N, C].
        feature_layer: dotted name of the layer whose input is the feature vector; when None, that
            in the network's attribute `feature_layer`, or else its last linear layer.
        fold: compute each BatchNorm that follows a convolution or linear layer as part of that
            layer, see `fold_batch_norm`.
        watch: keep the statistics of what enters each BatchNorm, for `batch_norm_loss`; nothing is
            folded then. A warning is logged if there is none.

    Raises:
        UserError: there is no such layer, or the network cannot be copied.
    """

    def __init__(
        self,
        network: nn.Module,
        feature_layer: str | None = None,
        fold: bool = True,
        watch: bool = False,
    ) -> None:
        super().__init__()
        self._fingerprint = _fingerprint(network)
        try:
            network = copy.deepcopy(network)
        except RuntimeError as error:
            raise UserError(
                "the teacher cannot be copied; remove its weight_norm or other hooks that compute "
                f"weights ({first_line(error)})"
            ) from error
        network.eval()
        for parameter in network.parameters():
            parameter.detach_()  # requires_grad_(False) refuses those of a copied TorchScript
        self._features: Tensor | None = None
        own = getattr(network, "feature_layer", None)
        own = own if isinstance(own, str) else _last_linear(network)
        self._feature_layer = feature_layer or own
        if self._feature_layer is None:
            log.warning(
                "the teacher shows no linear layer and no feature layer is named: the activation "
                "loss is off"
            )
        else:
            layers = dict(network.named_modules(remove_duplicate=False))
            if self._feature_layer not in layers:
                raise UserError(
                    f"the teacher has no layer {feature_layer!r}; it has "
                    + ", ".join(name for name in layers if name)
                )
            if isinstance(layers[self._feature_layer], torch.jit.ScriptModule):
                raise UserError(
                    "a TorchScript teacher does not show what enters its layers; name no feature "
                    "layer, or give the teacher as a program of torch.export"
                )
            layers[self._feature_layer].register_forward_pre_hook(self._keep_features)
        self.watched: list[Any] = []
        self._statistics: dict[nn.Module, Tensor] = {}
        if watch:
            self.watched = [
                layer
                for layer in network.modules()
                if isinstance(layer, _BATCH_NORMS) and layer.running_mean is not None
            ]
            if not self.watched:
                log.warning("the teacher has no BatchNorm layers: the BatchNorm loss is off")
            for layer in self.watched:
                layer.register_forward_pre_hook(self._keep_statistics)
        self.network = fold_batch_norm(network) if fold and not self.watched else network
        self.folded = self.network is not network

    def _keep_features(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]

    def _take_features(self) -> Tensor | None:
        features, self._features = self._features, None
        return features

    def _keep_statistics(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, mean, variance = with_moments(inputs[0])
        # Mean and mean square, because those of several processes' batches can be averaged.
        self._statistics[layer] = torch.stack([mean, variance + mean.square()])
        return (x, *inputs[1:])

    def batch_norm_loss(self, world: World) -> Tensor:
        """`losses.batch_norm_loss` of the last batch, which the processes of `world` share."""
        moments = [world.mean(self._statistics.pop(layer)) for layer in self.watched]
        means = [mean for mean, _ in moments]
        variances = [square - mean.square() for mean, square in moments]
        return batch_norm_loss(means, variances, self.watched)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in evaluation mode: the BatchNorm statistics are part of what the teacher knows."""
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        self._take_features()  # what a call of `network` by itself may have left
        logits = self.network(images)
        features = self._take_features()
        if features is not None:
            features = features.flatten(1)
        elif self._feature_layer is not None:
            raise UserError(
                f"the teacher's layer {self._feature_layer!r} did not run; name another as its "
                "feature layer"
            )
        return logits, features

    def cast(self, dtype: torch.dtype) -> FrozenTeacher:
        """Computes in bfloat16 or float16 from now on, inside autocast or outside; returns self.

        The values are those of `torch.autocast`, bit for bit. Autocast alone converts the weights
        of a frozen network anew at every call, since it remembers only those of trained ones;
        here convolutions and linear layers hold theirs converted. All other layers, among them
        BatchNorm that was not folded, keep their precision.
        """
        for layer in self.network.modules():
            # A weight that is no parameter is computed by a hook, in full precision.
            if type(layer) in _PRODUCTS and "weight" in layer._parameters:
                layer.to(dtype)
        self.network = _Autocast(self.network, dtype)
        return self

    def fingerprint(self) -> str:
        """SHA-256 over all weights of the given network and their names, as they were before
        folding and casting: a resumed run must meet the same teacher."""
        return self._fingerprint

    def check(self, images: Tensor) -> int:
        """Looks at the outputs for a batch of images before any training.

        Outputs between 0 and 1, as of a sigmoid, are only warned of: logits may be so too.

        Returns:
            The number of classes.

        Raises:
            UserError: the network does not take such images, its outputs are not [N, C] with
                C > 1, hold NaN or infinity, are probabilities instead of logits, or give no
                gradient to the images.
        """
        features: Tensor | None = None

        def network(images: Tensor) -> Tensor:
            nonlocal features
            logits, features = self(images)
            return logits

        with torch.enable_grad():
            logits = logits_of(network, images.detach().requires_grad_())
        if logits.shape[1] == 1:
            raise UserError(
                "the teacher has a single output, which leaves nothing to choose; give a binary "
                "teacher two: torch.cat([torch.zeros_like(t), t], 1) of its logit t"
            )
        for name, values in (("logits", logits), ("features", features)):
            if values is not None and not torch.isfinite(values).all():
                raise UserError(
                    f"the teacher's {name} hold NaN or infinity; check its weights and that it was "
                    "saved after successful training"
                )
        if not logits.requires_grad:
            raise UserError(
                "the teacher gives no gradient to its images, from which the generator learns; "
                "look for torch.no_grad() or detach() in its forward"
            )
        _refuse_probabilities(logits.detach())
        return logits.shape[1]


def logits_of(network: Callable[[Tensor], Tensor], images: Tensor, role: str = "teacher") -> Tensor:
    """A classifier's logits for images [N, C, H, W]; `role` names it in messages.

    Raises:
        UserError: it does not take such images, or returns something else.
    """
    shape = list(images.shape)
    try:
        logits = network(images)
    except UserError:
        raise
    except Exception as error:  # whatever the network says of images that do not fit
        raise UserError(
            f"the {role} does not take images of shape {shape}: {first_line(error)}"
        ) from error
    if not isinstance(logits, Tensor):
        raise UserError(f"the {role} must return logits [N, C] alone, got {type(logits).__name__}")
    if logits.dim() != 2 or len(logits) != len(images):
        raise UserError(
            f"the {role} must return logits [N, C], got {list(logits.shape)} for {shape}"
        )
    return logits


class _Autocast(nn.Module):
    """A network that brings its own autocast along."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.dtype):
            return self.network(images)


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """`network` (frozen, in evaluation mode) without the BatchNorm that its layers can absorb.

    For y = W x + b followed by gamma (y - mean) / sqrt(var + eps) + beta, with s = gamma /
    sqrt(var + eps) per output channel: W' = s W, b' = s (b - mean) + beta. Computed in float64 and
    rounded to the layer's own dtype.

    Folded is BatchNorm with running statistics, also as `F.batch_norm` inside a module of the
    user's own, directly after a convolution, transposed convolution or linear layer that runs once
    and whose output goes nowhere else. Layers with hooks, parametrizations or a class of their own
    are left as they are, and so is a network that torch.fx cannot trace, which is logged.

    Returns:
        A torch.fx module made of the same layers, or `network` itself if nothing was folded. It
        takes the images only: further arguments of `network` have their default values.
    """
    norms = sum(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())
    if norms == 0:
        return network
    # Inside a container the network is traced as it is called: with its own hooks, and with the
    # defaults of all its arguments but the images.
    root = nn.Sequential(network)
    try:
        graph = _Tracer().trace(root)
    except Exception as error:  # whatever the network's code makes of symbolic values
        log.warning(
            "the teacher's BatchNorm is not folded, torch.fx cannot trace it: %s",
            first_line(error),
        )
        return network
    runs: Counter[nn.Module] = Counter()
    for node in graph.nodes:
        if node.op == "call_module":
            runs.update(root.get_submodule(node.target).modules())
        elif node.op == "get_attr":
            runs[root.get_submodule(node.target.rpartition(".")[0])] += 1
    folded = 0
    for node in list(graph.nodes):
        norm = _batch_norm(node, root)
        if norm is None or norm.source.op != "call_module":
            continue
        layer = root.get_submodule(str(norm.source.target))
        if (
            type(layer) in _PRODUCTS
            and runs[layer] == 1
            and not _has_hooks(layer)
            and _output_channels(layer) == len(norm.mean)
            and all(user is node or _reads_shape(user) for user in norm.source.users)
        ):
            _absorb(layer, norm)
            node.replace_all_uses_with(norm.source)
            inputs = node.all_input_nodes
            graph.erase_node(node)
            for unused in inputs:
                if unused.op == "get_attr" and not unused.users:
                    graph.erase_node(unused)
            folded += 1
    log.info("folded %d of the teacher's %d BatchNorm layers", folded, norms)
    return fx.GraphModule(root, graph) if folded else network


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Hooks, that of the feature layer among them, must see tensors, not symbols.
        return _has_hooks(m) or super().is_leaf_module(m, module_qualified_name)


class _BatchNorm(NamedTuple):
    """What a BatchNorm in a graph computes, and the node that it normalises."""

    source: fx.Node
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def _batch_norm(node: fx.Node, root: nn.Module) -> _BatchNorm | None:
    """The BatchNorm that `node` is, if it is one with fixed statistics."""
    if node.op == "call_module":
        layer: Any = root.get_submodule(str(node.target))
        if type(layer) not in _BATCH_NORMS or _has_hooks(layer) or layer.training:
            return None
        source = node.all_input_nodes[0]
        values = [layer.running_mean, layer.running_var, layer.weight, layer.bias]
        eps = layer.eps
    elif node.target is F.batch_norm:
        call = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        call.apply_defaults()
        source, *values, training, _, eps = call.arguments.values()
        if training is not False or isinstance(eps, fx.Node):
            return None
        for i, value in enumerate(values):
            if isinstance(value, fx.Node):
                if value.op != "get_attr":
                    return None
                values[i] = attrgetter(str(value.target))(root)
    else:
        return None
    mean, var, weight, bias = values
    if mean is None or var is None:
        return None
    return _BatchNorm(source, mean, var, weight, bias, eps)


def _absorb(layer: Any, norm: _BatchNorm) -> None:
    mean, var = norm.mean.double(), norm.var.double()
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = (0 if layer.bias is None else layer.bias.double()) - mean
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight = layer.weight.double()
    ones = [1] * (weight.dim() - 2)
    if isinstance(layer, _TRANSPOSED):  # [in, out / groups, ...]: the groups lie in the inputs
        by_group = weight.unflatten(0, (layer.groups, -1))
        weight = (by_group * scale.view(layer.groups, 1, -1, *ones)).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, 1, *ones)
    # New parameters: the old ones may be another layer's as well.
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(shift.to(dtype), requires_grad=False)
    if weight.dim() < 4:
        layer.register_forward_pre_hook(_demand_channels_second)


def _demand_channels_second(layer: Any, inputs: tuple[Tensor, ...]) -> None:
    # [N, L, F] out of a linear layer would be normalised over L; with L = F nothing else tells.
    # The ranks of input and weight agree where the second dimension is the channels.
    if inputs[0].dim() != layer.weight.dim():
        raise UserError(
            "the teacher normalises another dimension than its layer's output; use fold=False"
        )


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer))


def _output_channels(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _reads_shape(node: fx.Node) -> bool:
    """Whether a node looks at nothing of its input that folding changes."""
    if node.op == "call_method":
        return node.target in ("dim", "size")
    return node.target is getattr and node.args[1] in ("ndim", "shape")


def _last_linear(network: nn.Module) -> str | None:
    names = [
        name
        for name, layer in network.named_modules()
        # The latter is attention's output projection, which is never called as a module.
        if isinstance(layer, nn.Linear) and not isinstance(layer, NonDynamicallyQuantizableLinear)
    ]
    return names[-1] if names else None


def _fingerprint(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().flatten()  # bytes of a scalar cannot be viewed
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _refuse_probabilities(outputs: Tensor) -> None:
    rows = outputs.float()
    # The sum of C rounded probabilities is off by half an epsilon of their dtype at most.
    tolerance = max(1e-3, 4 * torch.finfo(outputs.dtype).eps)
    positive = bool((rows >= 0).all())
    kind = None
    if positive and bool(((rows.sum(1) - 1).abs() < tolerance).all()):
        kind = "softmax"
    elif bool((rows.logsumexp(1).abs() < tolerance).all()):
        kind = "log-softmax"
    if kind is not None:
        raise UserError(
            f"the teacher ends in {kind}; the losses need logits: give the network "
            f"without its last {kind} layer"
        )
    if positive and bool((rows <= 1).all()):
        log.warning(
            "the teacher's outputs all lie between 0 and 1, as those of a sigmoid; the losses need "
            "logits"
        )
