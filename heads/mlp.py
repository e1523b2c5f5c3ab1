"""The small network of diffusion and flow heads: a residual MLP on one token, told z and the time by adaptive norms.

Source: MAR (Li et al. 2024, arXiv:2406.11838, sec. 4.2). What scales, shifts and gates its blocks depends on z and the
time alone, not on the token under way. So a solver knows it for all its steps beforehand: `ladder` computes it for many
steps in one product, which reads those weights, three fifths of the network, once instead of at every step.

Letters: D width of z, C channels of a token, W width of the network, n blocks, P = 3 n + 2 modulations.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn

from layers.adaln import Modulation
from layers.keymap import Join, Target
from layers.sincos import sincos

FREQUENCIES = 256  # channels of the sinusoid of the time
ROWS = 512  # of the products that `ladder` makes: enough to keep a processor busy, few enough to stay in its memory


def plain(width: int) -> nn.Module:
    """The branch of a block in MAR: two layers of the network's own width."""
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))


@lru_cache(maxsize=64)
def _on(times: tuple[float, ...], device: torch.device) -> Tensor:
    """float64 (S,), copied to the device once, not at every draw."""
    with torch.inference_mode(False):
        return torch.tensor(times, dtype=torch.float64, device=device)


class AdaptiveMLP(nn.Module):
    """x (..., C) under modulations (P, ..., W) -> (..., out_channels).

    branch: makes the body of a block from W. Blocks start as the identity and the output at zero.
    """

    def __init__(
        self,
        condition_dim: int,
        channels: int,
        out_channels: int,
        width: int,
        depth: int,
        branch: Callable[[int], nn.Module] = plain,
    ) -> None:
        super().__init__()
        self.embed_token = nn.Linear(channels, width)
        self.embed_condition = nn.Linear(condition_dim, width)
        self.embed_time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(depth))
        self.branches = nn.ModuleList(branch(width) for _ in range(depth))
        self.out_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.readout = nn.Linear(width, out_channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.embed_time[0].weight, std=0.02)
        nn.init.normal_(self.embed_time[2].weight, std=0.02)
        nn.init.zeros_(self.readout.weight)
        self.modulation = Modulation(width, width, 3 * depth + 2)

    def time(self, t: Tensor) -> Tensor:
        """t (...), any numbers -> (..., W)."""
        waves = sincos(t, FREQUENCIES, dtype=self.embed_time[0].bias.dtype)
        return self.embed_time(waves.roll(FREQUENCIES // 2, -1))  # cosines first

    def modulate(self, condition: Tensor) -> Tensor:
        """condition (a, b, W), embedded z plus embedded time -> (P, a, b, W): shift, 1 + scale, gate of every block, then
        shift, 1 + scale of the output."""
        modulations = self.modulation(condition)
        modulations[1::3] += 1
        return modulations

    def ladder(self, z: Tensor, times: tuple[float, ...]) -> Iterator[Tensor]:
        """z (..., D) -> for each of the times in turn the modulations (P, ..., W)."""
        condition = self.embed_condition(z)
        rows = rearrange(condition, "... w -> (...) w")
        for some in self.time(_on(times, z.device)).split(max(1, ROWS // max(1, len(rows)))):
            for modulations in self.modulate(rows + some[:, None]).unbind(1):
                yield modulations.reshape(len(modulations), *condition.shape)

    def forward(self, x: Tensor, modulations: Tensor) -> Tensor:
        """x need not carry the leading axes of the modulations: it is computed once as long as they share it."""
        x = self.embed_token(x)
        *blocks, shift, scale = modulations
        for i, (norm, branch) in enumerate(zip(self.norms, self.branches, strict=True)):
            block_shift, block_scale, gate = blocks[3 * i : 3 * i + 3]
            x = torch.addcmul(x, gate, branch(torch.addcmul(block_shift, norm(x), block_scale)))
        return self.readout(torch.addcmul(shift, self.out_norm(x), scale))

    def at(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The network at x (..., C), z (..., D), t (...), axes broadcast together: every row has a time of its own."""
        condition = self.embed_condition(z) + self.time(t)
        modulations = self.modulate(rearrange(condition, "... w -> 1 (...) w"))
        return self(x, modulations.reshape(len(modulations), *condition.shape))


def mlp_keys(depth: int, branch: Mapping[str, str], theirs: str = "net.", ours: str = "net.") -> dict[str, Target]:
    """The key map of published networks of this kind; `branch` maps the layers of a block's body, theirs -> ours.

    Their modulations, a layer a block and one for the output, are parts of ours.
    """
    layers = {
        "input_proj": "embed_token",
        "cond_embed": "embed_condition",
        "time_embed.mlp.0": "embed_time.0",
        "time_embed.mlp.2": "embed_time.2",
        "res_blocks.{i}.in_ln": "norms.{i}",
        **{f"res_blocks.{{i}}.mlp.{their}": f"branches.{{i}}.{our}" for their, our in branch.items()},
        "final_layer.linear": "readout",
    }
    modulations = [f"res_blocks.{i}.adaLN_modulation.1" for i in range(depth)] + ["final_layer.adaLN_modulation.1"]
    out: dict[str, Target] = {}
    for kind in ("weight", "bias"):
        out |= {f"{theirs}{their}.{kind}": f"{ours}{our}.{kind}" for their, our in layers.items()}
        out |= {
            f"{theirs}{their}.{kind}": Join(f"{ours}modulation.project.{kind}", part, depth + 1)
            for part, their in enumerate(modulations)
        }
    return out
