"""The objective of an image tokenizer: pixels, perceptual features, an adversary, and the tokenizer's own terms.

Source: VQGAN (Esser et al. 2021, arXiv:2012.09841, eq. 4 to 7) and the recipe of LlamaGen (Sun et al. 2024,
arXiv:2406.06525, sec. 2.1). All weights are here and none in the tokenizer: a term leaves it unweighted.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from layers.record import build
from training.adversary import Adversary
from training.discriminator import DISCRIMINATORS
from training.perceptual import PerceptualDistance

OURS = ("l1", "l2", "perceptual", "adversarial", "adaptive_weight", "loss")  # names of this file in the logs


class TokenizerObjective(nn.Module):
    """Weights of everything that a tokenizer is trained for. What has weight 0 is neither built nor computed.

    Raises ValueError for weights that make no objective.

    Args:
        l1: Weight of the mean absolute error of pixels in [-1, 1].
        l2: Weight of their mean squared error.
        perceptual: Weight of LPIPS on VGG16 features.
        adversarial: Weight of the losses of both players, the tokenizer and a discriminator.
        adversarial_start: First step, counted from 0, of adversarial training.
        adversarial_rule: hinge losses, or non-saturating ones with softened targets.
        adversarial_every: The discriminator learns in each step whose number is a multiple of this.
        adversarial_lr: Its learning rate as a share of the tokenizer's.
        lecam: Weight of LeCam's regulariser, beside the discriminator's own loss.
        adaptive_weight: Whether the tokenizer's adversarial loss is also multiplied by the ratio of gradient norms at the
            decoder's last layer.
        terms: Weights of the tokenizer's own terms by name, of either sign; a term of weight 0 is logged.
        discriminator: Its class_path, PatchDiscriminator of pictures or ClipDiscriminator, and init_args; null is the first
            with its defaults.
        backbone_weights: File with torchvision's VGG16 weights for the perceptual term; null downloads them once.
    """

    def __init__(
        self,
        l1: float = 0.0,
        l2: float = 1.0,
        perceptual: float = 0.0,
        adversarial: float = 0.0,
        adversarial_start: int = 0,
        adversarial_rule: Literal["hinge", "soft"] = "hinge",
        adversarial_every: int = 1,
        adversarial_lr: float = 1.0,
        lecam: float = 0.0,
        adaptive_weight: bool = False,
        terms: dict[str, float] | None = None,
        discriminator: dict[str, Any] | None = None,
        backbone_weights: str | None = None,
    ) -> None:
        super().__init__()
        self.weights = {"l1": l1, "l2": l2, "perceptual": perceptual, "adversarial": adversarial}
        self.terms = dict(terms or {})
        if wrong := {name: weight for name, weight in self.weights.items() if not 0 <= weight < torch.inf}:
            raise ValueError(f"objective: weights must be finite and not negative, got {wrong}")
        if wrong := {name: weight for name, weight in self.terms.items() if not isfinite(weight) or name in OURS}:
            raise ValueError(f"objective: terms need finite weights and names other than {OURS}, got {wrong}")
        if not l1 + l2 + perceptual and not any(self.terms.values()):
            raise ValueError("objective: l1, l2, perceptual and all terms are 0: there is nothing to train for")
        if adaptive_weight and not (adversarial and l1 + l2 + perceptual):
            raise ValueError(
                "objective: adaptive_weight needs adversarial, and l1, l2 or perceptual to compare it with"
            )
        if adversarial_every < 1 or not 0 < adversarial_lr < torch.inf or not 0 <= lecam < torch.inf:
            raise ValueError(
                f"objective: adversarial_every={adversarial_every} must be at least 1, adversarial_lr={adversarial_lr} "
                f"positive, lecam={lecam} not negative"
            )
        self.adversarial_start, self.adversarial_every = adversarial_start, adversarial_every
        self.adversarial_lr = adversarial_lr
        self.adaptive_weight = adaptive_weight
        self.perceptual = PerceptualDistance(backbone_weights) if perceptual else None
        self.adversary = None
        if adversarial:
            critic = build(discriminator or {"class_path": "PatchDiscriminator", "init_args": {}}, DISCRIMINATORS)
            self.adversary = Adversary(critic, adversarial_rule, lecam)

    def adversarial_weight(self, step: int) -> float:
        """The weight of both adversarial losses at this step, before any adaptation."""
        return self.weights["adversarial"] if step >= self.adversarial_start else 0.0

    def critic_learns(self, step: int) -> bool:
        return self.adversarial_weight(step) > 0 and step % self.adversarial_every == 0

    def forward(
        self,
        images: Tensor,
        reconstruction: Tensor | None,
        parts: Mapping[str, Any],
        step: int,
        last_layer: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The tokenizer's loss, and its parts: unweighted, detached, by name.

        images, reconstruction (B, 3, H, W); parts: of the tokenizer's forward, whose floating scalars are its terms;
        last_layer: weight of the decoder's last layer, read by adaptive_weight. The critic gets no gradient.
        Raises ValueError where terms and weights do not match, and for a reconstruction that is not like the images.
        """
        if self.adaptive_weight and last_layer is None:
            raise ValueError("objective: adaptive_weight needs last_layer, the decoder's last weight tensor")
        own = self._own_terms(parts)
        fit = self._fit(images, reconstruction)
        values = {**fit, **own}
        weights = self.weights | self.terms
        total = sum(weights[name] * value for name, value in values.items() if weights[name])
        logs = {name: value.detach() for name, value in values.items()}
        if weight := self.adversarial_weight(step):
            adversarial = self.adversary.tokenizer_loss(reconstruction)
            logs["adversarial"] = adversarial.detach()
            if self.adaptive_weight:
                base = sum(weights[name] * value for name, value in fit.items())
                logs["adaptive_weight"] = gradient_ratio(base, adversarial, last_layer)
                weight = weight * logs["adaptive_weight"]
            total = total + weight * adversarial
        return total, logs | {"loss": total.detach()}

    def _own_terms(self, parts: Mapping[str, Any]) -> dict[str, Tensor]:
        own = {
            name: part
            for name, part in parts.items()
            if isinstance(part, Tensor) and part.dim() == 0 and part.is_floating_point()
        }
        if unknown := self.terms.keys() - own.keys():
            raise ValueError(f"objective: terms weighs {sorted(unknown)}; the tokenizer has the terms {sorted(own)}")
        if unweighted := own.keys() - self.terms.keys():
            raise ValueError(
                f"objective: the tokenizer's terms {sorted(unweighted)} have no weight; "
                "give each one under terms, 0 to leave it out"
            )
        return own

    def _fit(self, images: Tensor, reconstruction: Tensor | None) -> dict[str, Tensor]:
        """How far the reconstruction is from the images, by every measure that has a weight."""
        if not any(self.weights.values()):
            return {}
        if reconstruction is None or reconstruction.shape != images.shape:
            found = "none" if reconstruction is None else tuple(reconstruction.shape)
            raise ValueError(f"objective: images are {tuple(images.shape)}, the reconstruction is {found}")
        fit = {}
        if self.weights["l1"]:
            fit["l1"] = functional.l1_loss(reconstruction.float(), images.float())
        if self.weights["l2"]:
            fit["l2"] = functional.mse_loss(reconstruction.float(), images.float())
        if self.perceptual is not None:
            fit["perceptual"] = self.perceptual(*(frames(x) for x in (images, reconstruction))).mean()
        return fit


def frames(x: Tensor) -> Tensor:
    """Pictures as they are; clips (B, 3, T, H, W) -> (B T, 3, H, W)."""
    return rearrange(x, "b c t h w -> (b t) c h w") if x.dim() == 5 else x


def gradient_ratio(base: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """|d base / d last_layer| / (|d adversarial / d last_layer| + 1e-4), at most 1e4, detached: VQGAN's eq. 7.

    The two constants are those of its published code.
    """
    norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (base, adversarial)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)
