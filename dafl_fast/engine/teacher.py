"""The fixed teacher: frozen, in evaluation mode, with its feature vector brought along."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..errors import UserError


class FrozenTeacher(nn.Module):
    """Any classifier as the judge of generated images: images [N, C, H, W] -> (logits, features).

    The parameters are frozen, so the backward pass computes the gradient to the images and no
    weight gradients. The features are the input of `feature_layer` (or of the last linear layer),
    taken by a hook; the network itself is not changed.

    Args:
        network: the classifier; put in evaluation mode. It must return logits [N, C].
        feature_layer: dotted name of the layer whose input is the feature vector.

    Raises:
        UserError: there is no such layer, or no linear layer to choose.
    """

    def __init__(self, network: nn.Module, feature_layer: str | None = None) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        layers = OrderedDict(network.named_modules())
        if feature_layer is None:
            linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
            if not linear:
                raise UserError("the teacher has no linear layer; name its feature layer")
            feature_layer = linear[-1]
        if feature_layer not in layers:
            raise UserError(
                f"the teacher has no layer {feature_layer!r}; it has "
                + ", ".join(name for name in layers if name)
            )
        self._features: Tensor | None = None
        layers[feature_layer].register_forward_pre_hook(self._keep_features)

    def _keep_features(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in evaluation mode: the BatchNorm statistics are part of what the teacher knows."""
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(images)
        features = self._features
        assert features is not None, "the feature layer did not run"
        self._features = None
        return logits, features.flatten(1)

    def fingerprint(self) -> str:
        """SHA-256 over all weights and their names: a resumed run must meet the same teacher."""
        digest = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def check(self, images: Tensor) -> None:
        """Looks at the outputs for a batch of images before any training.

        Raises:
            UserError: the network does not take such images, its outputs are not [N, C], hold NaN
                or infinity, or are probabilities instead of logits.
        """
        shape = list(images.shape)
        try:
            logits, features = self(images)
        except RuntimeError as error:
            raise UserError(
                f"the teacher does not take images of shape {shape}: " + str(error).splitlines()[0]
            ) from error
        if logits.dim() != 2 or len(logits) != len(images):
            raise UserError(
                f"the teacher must return logits [N, C], got {list(logits.shape)} for {shape}"
            )
        for name, values in (("logits", logits), ("features", features)):
            if not torch.isfinite(values).all():
                raise UserError(
                    f"the teacher's {name} hold NaN or infinity; check its weights and that it was "
                    "saved after successful training"
                )
        rows = logits.float()
        ones = torch.ones(len(rows), device=rows.device)
        for sums, kind in ((rows.sum(1), "softmax"), (rows.exp().sum(1), "log-softmax")):
            if logits.shape[1] > 1 and torch.allclose(sums, ones, atol=1e-3):
                if kind == "log-softmax" or (rows >= 0).all():
                    raise UserError(
                        f"the teacher ends in {kind}; the losses need logits: give the network "
                        f"without its last {kind} layer"
                    )
