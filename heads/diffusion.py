"""Diffusion head: a small network denoises one continuous token given z.

Source: MAR (Li et al. 2024, arXiv:2406.11838, sec. 3.2 and 4.2). Trained on a cosine schedule of 1000 steps with a learned
range of variances, sampled on a shorter chain; Hi-MAR keeps the variances at their upper end, MARDM at their lower.

Letters: R branches of guidance, B samples, L positions of a picture, m positions drawn, D width of z, C channels of a
token, S sampling steps.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heads.mlp import AdaptiveMLP, mlp_keys
from heads.protocol import Draw, Head, Trajectory
from layers.diffusion import (
    SCHEDULES,
    VARIANCES,
    bound_term,
    log_variance,
    p_mean,
    q_sample,
    respaced,
    tables,
)
from layers.keymap import Target, translate
from layers.record import look_up
from layers.spec import Sequence, TokenSpec


class DiffusionHead(Head):
    """z (..., D) -> a law over tokens of C channels, as the end of a chain of denoising steps.

    hidden, depth: of the network. steps: how many steps a draw takes, a number or a plan of layers.diffusion.respaced.
    repeats: how many noise levels each token is trained on for one z. schedule, train_steps, variance (learned_range,
    fixed_small, fixed_large): of the chain; a fixed variance leaves the bound out of the loss.
    Raises ValueError for a spec of discrete tokens, or a plan or a variance that is not known.
    """

    def __init__(
        self,
        width: int,
        spec: TokenSpec,
        hidden: int = 1024,
        depth: int = 3,
        steps: int | str = 100,
        repeats: int = 4,
        schedule: str = "cosine",
        train_steps: int = 1000,
        variance: str = "learned_range",
    ) -> None:
        super().__init__()
        if spec.channels is None:
            raise ValueError(f"DiffusionHead needs continuous tokens, the tokenizer makes discrete ones: {spec}")
        if variance not in VARIANCES:
            raise ValueError(f"DiffusionHead: variance {variance!r} is not known; known: {', '.join(VARIANCES)}")
        self.channels, self.repeats, self.variance = spec.channels, repeats, variance
        betas = look_up(schedule, SCHEDULES, "noise schedule")(train_steps)
        self.train_chain = tables(betas)
        self.chain = tables(betas, respaced(train_steps, steps))
        self.net = AdaptiveMLP(width, self.channels, self.channels * (1 + self.learned), hidden, depth)

    @property
    def learned(self) -> bool:
        return self.variance == "learned_range"

    def split(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the network -> noise (..., C) and the share of the variance's range (..., C), in float32 at least."""
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        noise = out[..., : self.channels]
        return noise, out[..., self.channels :] if self.learned else noise

    def denoise(self, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., C), t (...) steps of the trained schedule, z (..., D) -> noise and share of the variance's range."""
        return self.split(self.net.at(x.to(z.dtype), z, t))

    def terms(self, z: Tensor, target: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of the noise, and the bound (bits a channel; 0 under a fixed variance): (...) each.

        z (..., D), target and noise (..., C), t int64 (...), axes broadcast together. The bound trains the variance only.
        """
        x = q_sample(self.train_chain, target, t, noise)
        found, share = self.denoise(x, t, z)
        error = (noise - found).square().mean(-1)
        if not self.learned:
            return error, torch.zeros_like(error)
        return error, bound_term(self.train_chain, target, x, t, found.detach(), share)

    def loss(
        self,
        z: Tensor,
        target: Tensor,
        *,
        mask: Tensor | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """z (B, L, D), target (B, L, C) -> (B, L), the mean over `repeats` noise levels of each token.

        mask bool (B, L): only these tokens are computed, the others are 0. t int64 (repeats, B, L) and noise
        (repeats, B, L, C) are drawn unless given; their first axis need not be `repeats`.
        """
        target = target.to(torch.promote_types(target.dtype, torch.float32))
        if t is None:
            t = torch.randint(len(self.train_chain), (self.repeats, *target.shape[:-1]), device=target.device)
        if noise is None:
            noise = torch.randn((*t.shape, self.channels), dtype=target.dtype, device=target.device)
        if mask is None:
            return sum(self.terms(z, target, t, noise)).mean(0)
        mask = mask.bool()
        chosen = sum(self.terms(z[mask], target[mask], t[:, mask], noise[:, mask])).mean(0)
        return chosen.new_zeros(mask.shape).masked_scatter(mask, chosen)

    def trajectory(self, z: Tensor, draw: Draw) -> Trajectory:
        """z (R, B, m, D) -> tokens (B, m, C) and the statistics of the chain that made them.

        Noise: part 0 is where the chain starts, part i what its i-th step adds, scaled by the temperature; the last step
        adds none. The branches share the token under way; guidance mixes their predicted noise, part i for step i + 1,
        while the variance is that of the first branch.
        """
        dtype = torch.promote_types(z.dtype, torch.float32)
        x = draw.normal((self.channels,), part=0).to(dtype)
        log_std = torch.zeros_like(x)
        before = log_std
        mean = x
        steps = len(self.chain)
        for i, modulations in enumerate(self.net.ladder(z, tuple(self.chain.timesteps.flip(0).tolist()))):
            k = steps - 1 - i
            noise, share = self.split(self.net(x.to(z.dtype), modulations))
            mean = p_mean(self.chain, x, k, draw.mix(noise, part=i))
            log_std = 0.5 * log_variance(self.chain, k, self.variance, share[0])
            if k:
                before = before + log_std
                x = mean + log_std.exp() * draw.temperature * draw.normal((self.channels,), part=i + 1).to(dtype)
        return Trajectory(mean, mean, log_std.exp() * draw.temperature, before)

    def sample(self, z: Tensor, draw: Draw) -> Tensor:
        """z (R, B, m, D) -> tokens (B, m, C). See `trajectory`."""
        return self.trajectory(z, draw).sample


# ---- published weights

ARGUMENTS = {"depth": "depth", "width": "hidden", "num_sampling_steps": "steps"}  # theirs -> ours


def diffusion_keys(depth: int, theirs: str = "net.", ours: str = "net.") -> dict[str, Target]:
    """MAR's head; inside a checkpoint of MAR its prefix is `diffloss.net.`."""
    return mlp_keys(depth, {"0": "0", "2": "2"}, theirs, ours)


def mar_diffloss_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> DiffusionHead:
    """The head from the original constructor's arguments: target_channels, z_channels, depth, width, num_sampling_steps.

    grad_checkpointing, which moves memory and no number, is read over.
    """
    arguments = {theirs: value for theirs, value in config.items() if theirs != "grad_checkpointing"}
    spec = TokenSpec(Sequence(1), decoded=(1, 1, 1), channels=arguments.pop("target_channels"))
    width = arguments.pop("z_channels")
    ours = {look_up(theirs, ARGUMENTS, "DiffLoss: argument"): value for theirs, value in arguments.items()}
    head = DiffusionHead(width, spec, **ours)
    head.load_state_dict(translate(state, diffusion_keys(ours["depth"]), head.state_dict()))
    return head
