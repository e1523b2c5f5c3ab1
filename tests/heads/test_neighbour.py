"""The neighbour head: the mean of the logits of the neighbours there are, and guidance before the read-outs."""

import pytest
import torch
from torch.testing import assert_close

from generators.protocol import Prediction
from heads.neighbour import Neighbour
from layers.noise import Noise
from layers.spec import Grid, Sequence, TokenSpec
from sampling.filters import Filter
from sampling.guidance import RULES, Guidance
from sampling.sampler import Sampler

CLIP = TokenSpec(Grid(2, 3, 4), decoded=(2, 3, 4), vocab_size=13)


def randomised(spec: TokenSpec = CLIP) -> Neighbour:
    torch.manual_seed(0)
    head = Neighbour(8, spec).double()
    torch.nn.init.normal_(head.readout.weight)
    return head


def test_logits_are_the_mean_over_the_axes_that_have_a_neighbour() -> None:
    head, states = randomised(), torch.randn(5, 3, 8, dtype=torch.float64)
    right, down, following = head.readout.weight.split(8, dim=1)
    one, two, three = states.unbind(1)
    assert_close(head.by_axis(states), torch.stack([one @ right.T, two @ down.T, three @ following.T]))
    share = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    assert_close(head.logits(states * share[:, None]), (one @ right.T + three @ following.T) / 2)


@pytest.mark.parametrize("rule", RULES)
def test_mixing_states_is_mixing_logits(rule: str) -> None:
    """The same tokens, drawn or greedy, as when both branches of logits are mixed."""
    head, z = randomised(), torch.randn(2, 16, 6, 3, 8, dtype=torch.float64)
    positions = torch.arange(6).expand(16, -1)
    prediction = Prediction(head, z, positions, positions, total=6, keep=6)
    guidance, noise = Guidance(scale=3.0, rule=rule, schedule="ramp"), Noise(1, torch.arange(16))
    for sampler in (Sampler(Filter(top_k=9), guidance), Sampler(guidance=guidance, greedy=True)):
        draw = sampler.draw(prediction, noise, 0)
        drawn, score = head.sample(z, draw), draw.score
        assert torch.equal(drawn, draw.token(head.logits(z)))
        assert_close(score, draw.score)


def test_an_untrained_head_is_uniform_and_float32_at_least() -> None:
    logits = Neighbour(8, CLIP).bfloat16().logits(torch.randn(2, 3, 8, dtype=torch.bfloat16))
    assert logits.dtype == torch.float32 and (logits == 0).all()


@pytest.mark.parametrize(
    ("spec", "axes", "words"),
    [
        (TokenSpec(Sequence(4), (1, 8, 8), vocab_size=5), None, "needs tokens on a Grid.*Sequence"),
        (TokenSpec(Grid(1, 2, 2), (1, 8, 8), channels=3), None, "needs discrete tokens"),
        (CLIP, 2, "axes is 2, must be 3 to 3 for tokens on Grid"),
    ],
)
def test_what_cannot_be_served_is_refused(spec: TokenSpec, axes: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Neighbour(8, spec, axes)
