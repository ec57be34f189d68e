"""The fixed teacher: frozen, with its BatchNorm folded, and returning its features."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import UserError
from ..losses import batch_norm_loss
from ..models.functional import with_moments
from ..models.twin import duplicate
from .checks import logits_of
from .distributed import World
from .ending import without_last_layer, without_last_node
from .evaluation import buffers_kept
from .fold import BATCH_NORMS, PRODUCTS, fold_batch_norm, input_of, thaw_batch_norm
from .outputs import LOGITS, Reading, as_classifier, demand_logits
from .structures import nodes_behind

log = logging.getLogger(__name__)


class FrozenTeacher(nn.Module):
    """Any classifier as a teacher: images [N, C, H, W] -> (logits, features).

    It uses a frozen copy of the network, so the backward pass computes the gradient to the images,
    but not to the weights. The features [N, F] are the input of a layer, which a hook records. If
    no layer is named and no linear layer can be found, the features are None, a warning is logged,
    and the loss has no activation term.

    The attribute `network` is the copy: images -> logits.

    Args:
        network: the classifier; used in evaluation mode. Without a reading it must return logits
            [N, C].
        feature_layer: dotted name of the layer whose input is the feature vector. By default the
            name in the network's attribute `feature_layer`, or else the last linear layer that its
            logits are computed with. Without a `reading` that has seen images, which tells what
            runs, it is the last that the network has.
        fold: fold each BatchNorm that follows a convolution or linear layer into that layer; see
            `fold_batch_norm`.
        watch: record the statistics of the input of each BatchNorm, for `batch_norm_loss`. Then
            nothing is folded. Without any BatchNorm a warning is logged.
        reading: what the network returns. A softmax, log-softmax or sigmoid at its end is taken
            off the copy, or logits are computed back: the attribute `read_as` is what the copy
            returns.

    Raises:
        UserError: there is no such layer, or the network cannot be copied.
    """

    def __init__(
        self,
        network: nn.Module,
        feature_layer: str | None = None,
        fold: bool = True,
        watch: bool = False,
        reading: Reading = LOGITS,
    ) -> None:
        super().__init__()
        self.reading, self._looked_at = reading.forgotten(), bool(reading.seen)
        self._fingerprint = _fingerprint(network)
        network = duplicate(network).eval()
        for parameter in network.parameters():
            parameter.detach_()  # requires_grad_(False) fails for a copied TorchScript
        thaw_batch_norm(network)
        read_as = without_last_layer(network, reading)
        self._features: Tensor | None = None
        own = getattr(network, "feature_layer", None)
        own = own if isinstance(own, str) else None
        self._ran, last = _layers_that_run(network, reading)
        self._feature_layer, self._named = feature_layer or own or last, bool(feature_layer or own)
        if self._feature_layer is None:
            log.warning(
                "the teacher shows no linear layer that its logits are computed with, and "
                "--feature-layer names no layer: the activation loss is off"
            )
        else:
            if not self._named and last != _last_linear(network):
                log.warning(
                    "the features are what enters the teacher's layer %s, the last linear one that "
                    "its logits are computed with; --feature-layer names another", last,
                )  # fmt: skip
            layers = dict(network.named_modules(remove_duplicate=False))
            if self._feature_layer not in layers:
                told = "" if feature_layer else ", which its attribute feature_layer names"
                raise UserError(
                    f"the teacher has no layer {self._feature_layer!r}{told}; it has "
                    + ", ".join(name for name in layers if name)
                )
            if isinstance(layers[self._feature_layer], torch.jit.ScriptModule):
                raise UserError(
                    "a TorchScript teacher does not show what enters its layers; name no feature "
                    "layer, or give the teacher as a program of torch.export"
                )
            self._hook = layers[self._feature_layer].register_forward_pre_hook(
                self._keep_features, with_kwargs=True
            )
        # Of the last call, and of one that goes on: a layer and its input's moments, in the order
        # in which the layers ran. One that ran twice is there twice, one that did not run is not.
        self._statistics: list[tuple[Any, Tensor, Tensor]] = []
        self._running: list[tuple[Any, Tensor, Tensor]] | None = None
        watched = layers_with_statistics(network) if watch else []
        if watch and not watched:
            log.warning(_why_none_is_watched(network))
        for layer in watched:
            layer.register_forward_pre_hook(self._keep_statistics, with_kwargs=True)
        self.watching = bool(watched)
        self.network = fold_batch_norm(network) if fold and not watched else network
        self.folded = self.network is not network
        if fold:  # and so may be traced
            self.network, read_as = without_last_node(self.network, read_as)
        self.network, self.read_as = as_classifier(self.network, read_as), read_as.forgotten()

    @property
    def watched(self) -> list[Any]:
        """The BatchNorm layers whose input statistics are recorded."""
        return layers_with_statistics(self.network) if self.watching else []

    def _keep_features(
        self, layer: nn.Module, inputs: tuple[Any, ...], others: dict[str, Any]
    ) -> None:
        self._features = input_of(inputs, others)

    def _do_without_features(self, why: str) -> None:
        """Raises UserError if the user has named the layer; else the teacher has no features."""
        if self._named:
            raise UserError(f"{why}, but features need one for each; name another --feature-layer")
        log.warning("%s: the activation loss is off; --feature-layer names another layer", why)
        self._hook.remove()
        self._feature_layer = None

    def _take_features(self) -> Tensor | None:
        features, self._features = self._features, None
        return features

    def _keep_statistics(
        self, layer: nn.Module, inputs: tuple[Any, ...], others: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, mean, variance = with_moments(input_of(inputs, others))
        if self._running is not None:  # not in a direct call of `network`
            self._running.append((layer, mean, variance))
        return (x, *inputs[1:]), others if inputs else {}

    def batch_norm_loss(self, world: World) -> Tensor:
        """`losses.batch_norm_loss` of the last batch, over all processes of `world`. A layer counts
        as often as it ran."""
        statistics, self._statistics = self._statistics, []
        layers, means, variances = zip(*statistics, strict=True)
        sizes = [len(mean) for mean in means]
        mean, variance = torch.cat(means), torch.cat(variances)
        whole = world.mean(mean)
        if world.size > 1:  # the variance within the shares of the processes, and of their means
            variance = world.mean(variance + (mean - whole).square())
        return batch_norm_loss(whole.split(sizes), variance.split(sizes), layers)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Does nothing: the teacher stays in evaluation mode, with its BatchNorm statistics."""
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        self._take_features()  # left by a direct call of `network`, if any
        self._running = [] if self.watching else None
        logits = self.network(images)
        self._statistics, self._running = self._running or [], None
        features = self._take_features()
        if features is not None:
            features = features.flatten(1)
        elif self._feature_layer is not None:
            some = f", such as {', '.join(self._ran[-3:])}" if self._ran else ""
            raise UserError(
                f"the teacher's layer {self._feature_layer!r} did not run; --feature-layer must "
                f"name one that does{some}"
            )
        return logits, features

    def cast(self, dtype: torch.dtype) -> FrozenTeacher:
        """Makes it compute in bfloat16 or float16, with or without autocast; returns self.

        The values are those of `torch.autocast`, bit for bit. Autocast would convert the weights of
        a frozen network at every call, because it caches only weights that are trained. Here the
        weights of convolutions and linear layers are converted once. All other layers, such as
        BatchNorm that was not folded, keep their precision.
        """
        for layer in self.network.modules():
            # A weight that is not a parameter is computed by a hook, in full precision.
            if type(layer) in PRODUCTS and "weight" in layer._parameters:
                layer.to(dtype)
        self.network = Autocast(self.network, dtype)
        return self

    def fingerprint(self) -> str:
        """SHA-256 of the names and weights of the user's network, before folding and casting. A
        resumed run must have the same teacher."""
        return self._fingerprint

    def check(self, images: Tensor, to_images: bool = True) -> int:
        """Checks the outputs for a batch of images, before training.

        Outputs between 0 and 1, like those of a sigmoid, only cause a warning: logits may lie there
        too.

        Args:
            images: [N, C, H, W].
            to_images: the gradient to the images is needed, as a generator learns from it.

        Returns:
            The number of classes.

        Raises:
            UserError: the network does not take such images, its outputs are not [N, C], hold NaN
                or infinity, give no gradient that is needed or, without a reading, are
                probabilities or one number only.
        """
        features: Tensor | None = None

        def network(images: Tensor) -> Tensor:
            nonlocal features
            logits, features = self(images)
            return logits

        with torch.enable_grad():
            logits = logits_of(network, images.detach().requires_grad_())
        if features is not None and len(features) != len(images):
            self._do_without_features(
                f"what enters the teacher's layer {self._feature_layer!r} has {len(features)} rows "
                f"for {len(images)} images"
            )
            features = None
        for name, values in (("logits", logits), ("features", features)):
            if values is None or torch.isfinite(values).all():
                continue
            if (torch.isfinite(values) | torch.isneginf(values)).all():
                raise UserError(
                    f"the teacher's {name} hold -inf, as those of masked classes, which the losses "
                    "cannot take; mask them with a large negative number, such as -1e9"
                )
            else:
                raise UserError(
                    f"the teacher's {name} hold NaN or infinity; check its weights and that it was "
                    "saved after successful training"
                )
        if to_images and (layer := _quantised_layer(self.network)):
            raise UserError(
                f"the teacher is quantised ({layer}), which leaves no gradient to learn from; give "
                "the network in floating point that it was made from"
            )
        if to_images and not logits.requires_grad:
            raise UserError(
                "the teacher gives no gradient to its images, from which the generator learns; "
                "look for torch.no_grad() or detach() in its forward"
            )
        if not self._looked_at:
            demand_logits(logits)
        if self.watching and not self._statistics:
            log.warning("the teacher runs none of its BatchNorm layers: the BatchNorm loss is off")
            self.watching = False
        return logits.shape[1]


class Autocast(nn.Module):
    """A network that runs under its own autocast, or under none."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, enabled: bool = True) -> None:
        super().__init__()
        self.network, self.dtype, self.enabled = network, dtype, enabled

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.dtype, self.enabled):
            return self.network(images if self.enabled else images.float())


def layers_with_statistics(network: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers of a network that have running statistics."""
    return [
        layer
        for layer in network.modules()
        if isinstance(layer, BATCH_NORMS) and layer.running_mean is not None
    ]


def hides_batch_norm(network: nn.Module) -> bool:
    """Whether a network is TorchScript that may have BatchNorm layers, which it does not show."""
    scripts = [one for one in network.modules() if isinstance(one, torch.jit.ScriptModule)]
    # Of a frozen one a single module is left, which does not show what it was made of.
    frozen = isinstance(network, torch.jit.ScriptModule) and len(scripts) == 1
    return frozen or any("BatchNorm" in one.original_name for one in scripts)


def _why_none_is_watched(network: nn.Module) -> str:
    if hides_batch_norm(network):
        return (
            "a TorchScript teacher does not show its BatchNorm layers: the BatchNorm loss is off; "
            "give it as a program of torch.export to use them"
        )
    return "the teacher has no BatchNorm layers: the BatchNorm loss is off"


def _is_linear(layer: nn.Module) -> bool:
    # Attention's output projection is of the latter class, and never called as a module.
    return isinstance(layer, nn.Linear) and not isinstance(layer, NonDynamicallyQuantizableLinear)


def _last_linear(network: nn.Module) -> str | None:
    names = [name for name, layer in network.named_modules() if _is_linear(layer)]
    return names[-1] if names else None


def _layers_that_run(network: nn.Module, reading: Reading) -> tuple[list[str], str | None]:
    """The names of the layers that run for the images that `reading` has seen, in their order, and
    of the last linear one that the logits are computed with. If none was seen, no names, and that
    of the last linear layer that there is."""
    ran: list[str] = []
    outputs: list[tuple[str, Tensor]] = []  # of the linear ones

    def note(name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        ran.append(name)
        if _is_linear(layer) and isinstance(output, Tensor):
            outputs.append((name, output))

    layers = [
        (name, layer)
        for name, layer in network.named_modules()
        if (not layer._modules or _is_linear(layer))  # one with a parametrization has it inside
        and not isinstance(layer, torch.jit.ScriptModule)
    ]
    handles = [layer.register_forward_hook(partial(note, name)) for name, layer in layers if name]
    numbers = None
    with contextlib.ExitStack() as after:
        for handle in handles:
            after.callback(handle.remove)
        after.enter_context(torch.enable_grad())
        after.enter_context(buffers_kept(network))
        if reading.seen:
            after.enter_context(contextlib.suppress(Exception))  # `check` says what is wrong
            images = reading.seen[0][0].clone().requires_grad_()
            numbers = reading.numbers(network(images))
    if numbers is None:
        return [], _last_linear(network)
    behind = nodes_behind(numbers)
    # Nothing is behind the logits of code that forbids gradients.
    linear = [name for name, output in outputs if output.grad_fn in behind or not behind]
    return list(dict.fromkeys(ran)), linear[-1] if linear else None


def _quantised_layer(network: nn.Module) -> str | None:
    kinds = (type(layer) for layer in network.modules())
    return next((one.__name__ for one in kinds if ".quantized." in f"{one.__module__}."), None)


def _fingerprint(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        for part in _bytes_of(value):
            digest.update(part)
    return digest.hexdigest()


def _bytes_of(value: Any) -> Iterator[Any]:
    """What is hashed of an entry of a state dict. Most are tensors, but `get_extra_state` may
    return anything; of an object its class is taken, as all else may differ between processes."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        if value.is_quantized:
            yield repr((value.qscheme(), value.dtype)).encode()
            yield from _bytes_of(value.dequantize())
            return
        flat = value.contiguous().flatten()  # a scalar cannot be viewed as bytes
        yield flat.view(torch.uint8).numpy()
    elif isinstance(value, (list, tuple, Mapping)):
        items = value.items() if isinstance(value, Mapping) else value
        for item in items:
            yield from _bytes_of(item)
    elif isinstance(value, (str, bytes, int, float, complex, torch.dtype, type(None))):
        yield repr(value).encode()
    else:
        yield type(value).__qualname__.encode()
