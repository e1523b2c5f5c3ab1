"""Residual quantisation: each stage quantises what the stages before it left; the code is the sum.

Source: Zeghidour et al. 2021, SoundStream (arXiv:2107.03312, alg. 1); Lee et al. 2022, RQ-VAE (arXiv:2203.01941,
sec. 3.1).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenizers_vis.quantizers.protocol import Quantized, Quantizer, straight_through


class ResidualQuantizer(Quantizer):
    """S quantisers of the same kind, each with its own codebook. ids (..., S), coarse to fine.

    stage: makes one quantiser. shrink: stage s works at the scale shrink^s, for codes of a fixed size (LFQ, FSQ); 1 for
    learned ones. Straight through on the sum; a loss is the mean over stages of the stages' losses.
    Raises ValueError for a stage that is residual itself.
    """

    def __init__(self, stage: Callable[[], Quantizer], stages: int, shrink: float = 1.0) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stage() for _ in range(stages))
        self.scales = [shrink**s for s in range(stages)]
        self.dim, self.vocab_size, self.depth = self.stages[0].dim, self.stages[0].vocab_size, stages
        if self.stages[0].depth != 1:
            raise ValueError(f"ResidualQuantizer: a stage must give 1 code a vector, gives {self.stages[0].depth}")

    def embed(self, ids: Tensor) -> Tensor:
        codes = zip(self.stages, ids.unbind(-1), self.scales, strict=True)
        return torch.stack([stage.embed(stage_ids) * scale for stage, stage_ids, scale in codes]).sum(0)

    def codebook(self) -> Tensor:
        return torch.stack([stage.codebook() * scale for stage, scale in zip(self.stages, self.scales, strict=True)])

    def _assign(self, z: Tensor, noise: Tensor | None) -> Tensor:
        ids, rest = [], z
        for s, (stage, scale) in enumerate(zip(self.stages, self.scales, strict=True)):
            ids.append(stage.assign(rest / scale, None if noise is None else noise[..., s]))
            rest = rest - stage.embed(ids[-1]) * scale
        return torch.stack(ids, -1)

    def _quantize(self, z: Tensor) -> Quantized:
        parts, rest = [], z
        for stage, scale in zip(self.stages, self.scales, strict=True):
            parts.append(stage(rest / scale))
            rest = rest - parts[-1].z_q.detach() * scale
        total = torch.stack([part.z_q.detach() * scale for part, scale in zip(parts, self.scales, strict=True)]).sum(0)
        losses = {name: torch.stack([part.losses[name] for part in parts]).mean() for name in parts[0].losses}
        return Quantized(straight_through(z, total), torch.stack([part.ids for part in parts], -1), losses)
