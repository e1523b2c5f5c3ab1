"""Flow heads: one continuous token is carried from noise to data along a learned velocity.

Sources: flow matching (Lipman et al. 2023, arXiv:2210.02747) under MAR's network; the rectified-flow head of Ming-UniVision
(2025, arXiv:2510.06590), whose blocks are gated; xAR (Ren et al. 2025, arXiv:2502.20388), whose velocity is the generator's
own output. Time runs from 1 (noise) to 0 (data), see layers.flow.

Letters: R branches of guidance, B samples, L positions of a picture, m positions drawn, D width of z, C channels of a
token, S sampling steps.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import GluMlp
from torch import Tensor, nn

from heads.mlp import AdaptiveMLP, mlp_keys, plain
from heads.protocol import Draw, Head
from layers.flow import (
    ODE_SOLVERS,
    Velocity,
    euler_maruyama,
    floored_times,
    interpolate,
    shifted,
    training_times,
    uniform_times,
)
from layers.keymap import Target, translate
from layers.record import look_up
from layers.spec import Sequence, TokenSpec

TIME_SCALE = 1000.0  # the networks are told 1000 t


class Path:
    """How a flow is followed: a solver and its times.

    solver: euler, heun or euler_maruyama. last: the time after which one last step goes to 0; None: equal steps.
    shift: more than 1 spends the steps nearer to the noise. Raises UnknownName for a solver not known.
    """

    def __init__(self, solver: str, steps: int, last: float | None, shift: float) -> None:
        look_up(solver, {**ODE_SOLVERS, "euler_maruyama": euler_maruyama}, "solver")
        times = uniform_times(steps) if last is None else floored_times(steps, last)
        self.solver, self.times = solver, tuple(shifted(t, shift) for t in times)

    def follow(self, velocity: Velocity, draw: Draw, channels: int, dtype: torch.dtype) -> Tensor:
        """Noise, part 0 the start and part i what the i-th step adds, scaled by the temperature -> tokens (B, m, C)."""

        def normal(part: int) -> Tensor:
            return draw.normal((channels,), part=part).to(dtype)

        start = draw.temperature * normal(0)
        if self.solver == "euler_maruyama":
            return euler_maruyama(velocity, start, self.times, normal, draw.temperature)
        return ODE_SOLVERS[self.solver](velocity, start, self.times)


class FlowHead(Head):
    """z (..., D) -> a law over tokens of C channels, by a small network's velocity.

    hidden, depth: of the network (see heads.mlp). solver, steps, last, shift: see Path. repeats: how many times t
    each token is trained on for one z, drawn by time_law (uniform, logit_normal).
    Raises ValueError for a spec of discrete tokens.
    """

    def __init__(
        self,
        width: int,
        spec: TokenSpec,
        hidden: int = 1024,
        depth: int = 3,
        solver: str = "euler",
        steps: int = 50,
        last: float | None = None,
        shift: float = 1.0,
        repeats: int = 4,
        time_law: str = "uniform",
    ) -> None:
        super().__init__()
        if spec.channels is None:
            raise ValueError(
                f"{type(self).__name__} needs continuous tokens, the tokenizer makes discrete ones: {spec}"
            )
        self.channels, self.repeats, self.time_law = spec.channels, repeats, time_law
        self.path = Path(solver, steps, last, shift)
        self.net = AdaptiveMLP(width, self.channels, self.channels, hidden, depth, self.branch)

    def branch(self, width: int) -> nn.Module:
        """The part of a block that runs on `width` channels, once modulated."""
        return plain(width)

    def velocity(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x (..., C), t (...) in [0, 1], z (..., D) -> dx/dt (..., C)."""
        out = self.net.at(x.to(z.dtype), z, TIME_SCALE * t)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def loss(
        self,
        z: Tensor,
        target: Tensor,
        *,
        mask: Tensor | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Squared error of the velocity: z (B, L, D), target (B, L, C) -> (B, L), the mean over `repeats` times.

        mask bool (B, L): only these tokens are computed, the others are 0. t (repeats, B, L) and noise (repeats, B, L, C)
        are drawn unless given; their first axis need not be `repeats`.
        """
        target = target.to(torch.promote_types(target.dtype, torch.float32))
        if t is None:
            t = training_times(self.time_law, (self.repeats, *target.shape[:-1]), target.device)
        if noise is None:
            noise = torch.randn((*t.shape, self.channels), dtype=target.dtype, device=target.device)
        if mask is None:
            return self._error(z, target, t, noise).mean(0)
        mask = mask.bool()
        chosen = self._error(z[mask], target[mask], t[:, mask], noise[:, mask]).mean(0)
        return chosen.new_zeros(mask.shape).masked_scatter(mask, chosen)

    def _error(self, z: Tensor, target: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        found = self.velocity(interpolate(target, noise, t), t, z)
        return (noise - target - found).square().mean(-1)

    def sample(self, z: Tensor, draw: Draw) -> Tensor:
        """z (R, B, m, D) -> tokens (B, m, C). The branches share the token under way; guidance mixes their velocities,
        part i at the i-th time, counted from 0."""
        dtype = torch.promote_types(z.dtype, torch.float32)
        ladder = enumerate(self.net.ladder(z, tuple(TIME_SCALE * t for t in self.path.times)))
        reached, modulations = next(ladder)

        def velocity(x: Tensor, i: int) -> Tensor:
            nonlocal reached, modulations
            while reached < i:  # solvers ask for the times in order, heun twice for some
                reached, modulations = next(ladder)
            return draw.mix(self.net(x.to(z.dtype), modulations).to(dtype), part=i)

        return self.path.follow(velocity, draw, self.channels, dtype)


def gated(width: int, expansion: float) -> nn.Module:
    """The branch of a block in Ming-UniVision: SwiGLU, its hidden width two thirds of expansion * width, up to a multiple
    of 8."""
    hidden = (int(int(width * expansion) * 2 / 3) + 7) // 8 * 8
    return GluMlp(width, 2 * hidden, act_layer=nn.SiLU, gate_last=False)


class RectifiedFlowHead(FlowHead):
    """A flow head with gated blocks, Euler steps and times that can be shifted, as Ming-UniVision has it.

    expansion: of the blocks' hidden width, before the two thirds that gating costs.
    """

    def __init__(
        self,
        width: int,
        spec: TokenSpec,
        hidden: int = 3072,
        depth: int = 12,
        expansion: float = 4.0,
        steps: int = 16,
        shift: float = 1.0,
        repeats: int = 4,
        time_law: str = "uniform",
    ) -> None:
        self.expansion = expansion
        super().__init__(width, spec, hidden, depth, "euler", steps, shift=shift, repeats=repeats, time_law=time_law)

    def branch(self, width: int) -> nn.Module:
        return gated(width, self.expansion)


class FieldHead(Head):
    """A flow without a network of its own: z is the velocity that the generator computes. Source: xAR.

    solver, steps, last, shift: see Path. The state of the solver is float64. `width` is not read: there is nothing to build.
    """

    def __init__(
        self,
        width: int,
        spec: TokenSpec,
        solver: str = "euler_maruyama",
        steps: int = 50,
        last: float | None = 0.04,
        shift: float = 1.0,
    ) -> None:
        super().__init__()
        if spec.channels is None:
            raise ValueError(f"FieldHead needs continuous tokens, the tokenizer makes discrete ones: {spec}")
        self.channels = spec.channels
        self.path = Path(solver, steps, last, shift)

    def loss(self, z: Tensor, target: Tensor, *, noise: Tensor) -> Tensor:
        """z, a velocity, target and noise (B, L, C) -> squared error (B, L)."""
        return (noise - target - z).square().mean(-1)

    def sample(self, z: Callable[[Tensor, Tensor], Tensor], draw: Draw) -> Tensor:
        """z(x (B, m, C) float64, t ()) -> velocities (R, B, m, C); returns tokens (B, m, C), float64.

        z is asked at the times in order, and guidance mixes the velocities, part i at the i-th time, counted from 0.
        """

        def velocity(x: Tensor, i: int) -> Tensor:
            t = torch.full((), self.path.times[i], dtype=x.dtype, device=x.device)
            return draw.mix(z(x, t).to(x.dtype), part=i)

        return self.path.follow(velocity, draw, self.channels, torch.float64)


# ---- published weights


def rectified_flow_keys(depth: int, theirs: str = "net.", ours: str = "net.") -> dict[str, Target]:
    """Ming-UniVision's head; inside its language model's file the prefix is `model.diffloss.net.`.

    Its velocity points from noise to data, ours the other way: the last layer changes its sign.
    """
    keys = mlp_keys(depth, {"w12": "fc1", "w3": "fc2"}, theirs, ours)
    readout = {
        f"{theirs}final_layer.linear.{kind}": (f"{ours}readout.{kind}", torch.neg) for kind in ("weight", "bias")
    }
    return {**keys, **readout}


ARGUMENTS = {  # theirs -> ours
    "depth": "depth",
    "width": "hidden",
    "num_sampling_steps": "steps",
    "mlp_mult": "expansion",
    "time_shifting_factor": "shift",
}


def rectified_flow_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> RectifiedFlowHead:
    """The head of Ming-UniVision from the original constructor's arguments, and time_shifting_factor, an argument of its
    sampler: target_channels, z_channels, depth, width, num_sampling_steps, mlp_mult (1 when left out).

    grad_checkpointing, which moves memory and no number, is read over.
    """
    arguments = {
        "mlp_mult": 1.0,
        **{theirs: value for theirs, value in config.items() if theirs != "grad_checkpointing"},
    }
    spec = TokenSpec(Sequence(1), decoded=(1, 1, 1), channels=arguments.pop("target_channels"))
    width = arguments.pop("z_channels")
    ours = {look_up(theirs, ARGUMENTS, "RectifiedFlowLoss: argument"): value for theirs, value in arguments.items()}
    ours |= {"steps": int(ours["steps"]), "shift": float(ours.get("shift") or 1)}  # a string, and None, in the original
    head = RectifiedFlowHead(width, spec, **ours)
    head.load_state_dict(translate(state, rectified_flow_keys(ours["depth"]), head.state_dict()))
    return head
