"""The fixed teacher: frozen, with its BatchNorm folded, and returning its features."""

from __future__ import annotations

import copy
import hashlib
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import UserError, first_line
from ..losses import batch_norm_loss
from ..models.functional import with_moments
from .checks import logits_of
from .distributed import World
from .ending import without_last_layer, without_last_node
from .fold import BATCH_NORMS, PRODUCTS, fold_batch_norm, thaw_batch_norm
from .outputs import LOGITS, Reading, as_classifier, demand_logits

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
            name in the network's attribute `feature_layer`, or else its last linear layer.
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
        try:
            network = copy.deepcopy(network)
        except RuntimeError as error:
            raise UserError(
                "the teacher cannot be copied; remove its weight_norm or other hooks that compute "
                f"weights ({first_line(error)})"
            ) from error
        network.eval()
        for parameter in network.parameters():
            parameter.detach_()  # requires_grad_(False) fails for a copied TorchScript
        thaw_batch_norm(network)
        read_as = without_last_layer(network, reading)
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
        # Of the last call, and of one that goes on: a layer and its input's moments, in the order
        # in which the layers ran. One that ran twice is there twice, one that did not run is not.
        self._statistics: list[tuple[Any, Tensor, Tensor]] = []
        self._running: list[tuple[Any, Tensor, Tensor]] | None = None
        watched = layers_with_statistics(network) if watch else []
        if watch and not watched:
            log.warning(_why_none_is_watched(network))
        for layer in watched:
            layer.register_forward_pre_hook(self._keep_statistics)
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

    def _keep_features(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]

    def _take_features(self) -> Tensor | None:
        features, self._features = self._features, None
        return features

    def _keep_statistics(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, mean, variance = with_moments(inputs[0])
        if self._running is not None:  # not in a direct call of `network`
            self._running.append((layer, mean, variance))
        return (x, *inputs[1:])

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
            raise UserError(
                f"the teacher's layer {self._feature_layer!r} did not run; name another as its "
                "feature layer"
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
        for name, values in (("logits", logits), ("features", features)):
            if values is not None and not torch.isfinite(values).all():
                raise UserError(
                    f"the teacher's {name} hold NaN or infinity; check its weights and that it was "
                    "saved after successful training"
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


def _why_none_is_watched(network: nn.Module) -> str:
    scripts = [one for one in network.modules() if isinstance(one, torch.jit.ScriptModule)]
    # Of a frozen TorchScript one module is left, which does not show what it was made of.
    if len(scripts) == 1 or any("BatchNorm" in one.original_name for one in scripts):
        return (
            "a TorchScript teacher does not show its BatchNorm layers: the BatchNorm loss is off; "
            "give it as a program of torch.export to use them"
        )
    return "the teacher has no BatchNorm layers: the BatchNorm loss is off"


def _last_linear(network: nn.Module) -> str | None:
    names = [
        name
        for name, layer in network.named_modules()
        # Attention's output projection is of the latter class, and never called as a module.
        if isinstance(layer, nn.Linear) and not isinstance(layer, NonDynamicallyQuantizableLinear)
    ]
    return names[-1] if names else None


def _fingerprint(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().flatten()  # a scalar cannot be viewed as bytes
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()
