"""The game between a tokenizer and a critic of its reconstructions: who loses what, and the critic's regulariser.

Sources: hinge losses (Lim & Ye 2017, arXiv:1705.02894), as VQGAN and LlamaGen play; the non-saturating ones (Goodfellow
et al. 2014, arXiv:1406.2661) with softened targets, as LARP does (arXiv:2410.21264); LeCam (Tseng et al. 2021,
arXiv:2104.03310).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

SOFT, SOFTEST = 0.15, 0.3  # targets are off by SOFT |n|, n standard normal, and by SOFTEST at most
REMEMBERED = 0.999  # decay of the critic's mean logits


class Adversary(nn.Module):
    """critic: images or clips -> logits, high where they look real.

    rule: of both players; lecam: weight of the distance that the critic's mean logits keep from those it gave to the other
    side of late, beside the rule's 1.
    """

    def __init__(self, critic: nn.Module, rule: Literal["hinge", "soft"] = "hinge", lecam: float = 0.0) -> None:
        super().__init__()
        self.critic, self.lecam = critic, lecam
        self.of_tokenizer, self.of_critic = RULES[rule]
        self.register_buffer("real", torch.zeros(()))  # mean logits of late
        self.register_buffer("fake", torch.zeros(()))

    def tokenizer_loss(self, reconstruction: Tensor) -> Tensor:
        """Scalar; the critic gets no gradient."""
        frozen = {name: parameter.detach() for name, parameter in self.critic.named_parameters()}
        return self.of_tokenizer(functional_call(self.critic, frozen, reconstruction))

    def forward(self, images: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss, and its parts, detached, by name; no gradient to what it is given."""
        real, fake = self.critic(images.detach()), self.critic(reconstruction.detach())
        loss = self.of_critic(real, fake)
        means = {"logits_real": real.float().mean(), "logits_fake": fake.float().mean()}
        logs = {"discriminator": loss.detach()}
        if self.lecam:
            kept = (means["logits_real"] - self.fake).relu().square() + (
                self.real - means["logits_fake"]
            ).relu().square()
            loss, logs["lecam"] = loss + self.lecam * kept, kept.detach()
            for memory, mean in zip((self.real, self.fake), means.values(), strict=True):
                memory.lerp_(mean.detach(), 1 - REMEMBERED)
        return loss, logs | {name: mean.detach() for name, mean in means.items()}


def hinge_tokenizer(fake: Tensor) -> Tensor:
    """Logits of reconstructions -> scalar: they shall look real."""
    return -fake.float().mean()


def hinge_critic(real: Tensor, fake: Tensor) -> Tensor:
    """Logits of images and of reconstructions -> scalar, 0 where they are at least 1 and at most -1."""
    return 0.5 * ((1 - real.float()).relu().mean() + (1 + fake.float()).relu().mean())


def soft_tokenizer(fake: Tensor) -> Tensor:
    """Mean of -log sigmoid of the logits."""
    return -functional.logsigmoid(fake.float()).mean()


def soft_critic(real: Tensor, fake: Tensor) -> Tensor:
    """Cross-entropies against targets a little below 1 and a little above 0, each its own, drawn anew."""
    real, fake = real.float(), fake.float()
    off_real, off_fake = ((SOFT * torch.randn_like(logits).abs()).clamp_max(SOFTEST) for logits in (real, fake))
    entropy = functional.binary_cross_entropy_with_logits
    return entropy(real, 1 - off_real) + entropy(fake, off_fake)


RULES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "hinge": (hinge_tokenizer, hinge_critic),
    "soft": (soft_tokenizer, soft_critic),
}
