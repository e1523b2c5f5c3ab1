"""Neighbour head: one linear read-out an axis of the grid; a token's logits are the mean over the neighbours it has.

Source: "Neighboring Autoregressive Modeling for Efficient Visual Generation" (He et al. 2025, arXiv:2503.10696, sec. 3.2).

Letters: R branches of guidance, B samples, m positions, A axes of the grid, D width, V vocabulary. Axes are counted from
the fastest: column, row, and frame where there are several.
"""

import torch
from torch import Tensor

from heads.categorical import Categorical
from heads.protocol import Draw
from layers.spec import Grid, TokenSpec


class Neighbour(Categorical):
    """z (..., A, D), what the neighbour along each axis says, over the number of them, zero where there is none -> (..., V).

    The sum over axes of read-outs of such rows is the mean of the neighbours' logits. The read-outs lie side by side in
    one matrix (V, A D). They are linear, so guidance mixes what goes in, at half the cost of mixing logits.
    axes: 2, or 3 where there are frames; None: as many as the grid of `spec` needs.
    Raises ValueError for a spec of continuous tokens, or of tokens that do not lie on a grid of so many axes.
    """

    def __init__(self, width: int, spec: TokenSpec, axes: int | None = None) -> None:
        if not isinstance(spec.layout, Grid):
            raise ValueError(
                f"Neighbour needs tokens on a Grid, to have neighbours along its axes; the tokenizer makes {spec}"
            )
        needed = 2 if spec.layout.t == 1 else 3
        axes = needed if axes is None else axes
        if not needed <= axes <= 3:
            raise ValueError(f"Neighbour: axes is {axes}, must be {needed} to 3 for tokens on {spec.layout}")
        super().__init__(axes * width, spec)
        self.axes = self.states = axes

    def logits(self, z: Tensor) -> Tensor:
        """z (..., A, D) -> (..., V), float32 at least."""
        return super().logits(z.flatten(-2))

    def by_axis(self, states: Tensor) -> Tensor:
        """states (..., A, D) -> (A, ..., V): each read-out alone."""
        alone = torch.eye(self.axes, dtype=states.dtype, device=states.device)
        return torch.stack([self.logits(states * mask[:, None]) for mask in alone])

    def sample(self, z: Tensor, draw: Draw) -> Tensor:
        mixed = draw.mix(z.to(torch.promote_types(z.dtype, torch.float32)))
        return draw.token(self.logits(mixed[None].to(z.dtype)))
