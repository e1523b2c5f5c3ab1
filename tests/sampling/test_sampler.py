"""Inverse CDF, the law that is drawn from, and which tokens enter."""

import pytest
import torch
from torch.testing import assert_close

from generators.protocol import Prediction
from heads.categorical import Categorical
from layers.noise import Noise
from layers.spec import Grid, TokenSpec
from sampling.decode import impose
from sampling.filters import Filter
from sampling.guidance import Guidance
from sampling.sampler import Sampler, inverse_cdf
from sampling.smooth import Smooth

SPEC = TokenSpec(Grid(1, 2, 3), decoded=(1, 8, 12), vocab_size=11)


def prediction(rows: int = 4, branches: int = 2, keep: int = 3) -> Prediction:
    torch.manual_seed(0)
    head = Categorical(8, SPEC).double()
    torch.nn.init.normal_(head.readout.weight)
    places = torch.arange(3).expand(rows, -1)
    return Prediction(head, torch.randn(branches, rows, 3, 8, dtype=torch.float64), places + 1, places, 6, keep)


def test_inverse_cdf_takes_every_token_for_its_share_of_the_uniforms() -> None:
    probs = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0], dtype=torch.float64) * 3
    u = (torch.arange(1000) + 0.5) / 1000
    drawn = inverse_cdf(probs.expand(1000, -1), u.double())
    assert torch.bincount(drawn, minlength=6).tolist() == [0, 500, 0, 250, 250, 0]
    edges = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert inverse_cdf(probs.expand(3, -1), edges).tolist() == [1, 3, 4]


def test_draws_follow_the_guided_filtered_law() -> None:
    """Chi-square over 20,000 samples of 3 positions, seed 0; a right sampler fails it once in 1,000 seeds."""
    rows, sampler = 20_000, Sampler(Filter(temperature=0.8, top_k=5), Guidance(scale=2.0))
    made = prediction(1)
    law = sampler.probs(made)[0]  # (m, V)
    made.z = made.z.expand(2, rows, 3, 8)
    made.positions, made.index = (places.expand(rows, -1) for places in (made.positions, made.index))
    drawn = made.head.sample(made.z, sampler.draw(made, Noise(0, torch.arange(rows)), 0))
    counts = torch.stack([torch.bincount(drawn[:, place], minlength=11) for place in range(3)])
    assert (counts[law == 0] == 0).all() and ((law > 0).sum(1) == 5).all()
    chi_square = ((counts - rows * law) ** 2 / (rows * law).clamp_min(1e-9))[law > 0].sum()
    assert chi_square < 32.91  # the 0.999 quantile at 3 * (5 - 1) degrees of freedom


def test_the_law_is_mixed_by_the_schedule_then_filtered() -> None:
    made = prediction()
    sampler = Sampler(Filter(top_k=4), Guidance(scale=3.0, schedule="linear"))
    logits = made.head.logits(made.z)
    scale = 1 + 2 * (made.index + 1) / 6
    guided = logits[1] + scale[..., None] * (logits[0] - logits[1])
    assert_close(sampler.probs(made), Filter(top_k=4).probs(guided))


def test_one_branch_is_not_guided_and_greedy_takes_the_best() -> None:
    made = prediction(branches=1)
    draw = Sampler(greedy=True).draw(made, Noise(0, torch.arange(4)), 0)
    tokens = made.head.sample(made.z, draw)
    logits = made.head.logits(made.z)[0]
    assert torch.equal(tokens, logits.argmax(-1))
    assert_close(draw.score, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_most_confident_tokens_enter(keep: int) -> None:
    made = prediction(keep=keep)
    draw = Sampler().draw(made, Noise(0, torch.arange(4)), 0)
    draw.score = torch.tensor([[0.1, 0.3, 0.2], [1.0, 1.0, 1.0], [3.0, 2.0, 1.0], [0.0, 5.0, 5.0]])
    found = draw.keep(made)
    best = [[1, 2, 0], [0, 1, 2], [0, 1, 2], [1, 2, 0]]  # ties by index
    if keep == 3:
        assert found is None
    else:
        assert [row.nonzero().flatten().tolist() for row in found] == [sorted(order[:keep]) for order in best]


def test_impose_puts_the_given_tokens_at_their_places() -> None:
    given, mask = torch.arange(12).reshape(2, 6), torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 4] = mask[1, 1] = True
    positions, tokens = torch.tensor([[4, 5], [0, 1]]), torch.full((2, 2), 99)
    assert impose((given, mask), positions, tokens).tolist() == [[4, 99], [99, 7]]
    continuous = torch.full((2, 2, 3), 9.0)
    made = impose((given[..., None].expand(2, 6, 3).float(), mask), positions, continuous)
    assert made.tolist() == [[[4.0] * 3, [9.0] * 3], [[9.0] * 3, [7.0] * 3]]
    assert impose(None, positions, tokens) is tokens


def test_noise_decides_draws_by_position_and_not_by_round() -> None:
    made, noise = prediction(), Noise(7, torch.arange(4))
    first = made.head.sample(made.z, Sampler().draw(made, noise, 0))
    assert torch.equal(first, made.head.sample(made.z, Sampler().draw(made, noise, 5)))
    made.positions = made.positions + 1
    assert not torch.equal(first, made.head.sample(made.z, Sampler().draw(made, noise, 0)))


def test_temperatures_belong_to_the_steps_of_the_schedule() -> None:
    made = prediction()
    sampler = Sampler(Filter(temperature=0.5), Guidance(scale=2.0), temperatures=(0.5, 1.0, 2.0, 3.0, 4.0, 5.0))
    logits = made.head.logits(made.z)
    guided = logits[1] + 2 * (logits[0] - logits[1])
    steps = torch.tensor(sampler.temperatures, dtype=torch.float64)[made.index]
    assert_close(sampler.probs(made), (guided / steps[..., None] / 0.5).softmax(-1))
    with pytest.raises(ValueError, match="temperatures has 2 entries, this decoding has 6 steps"):
        Sampler(temperatures=(1.0, 1.0)).probs(made)
    with pytest.raises(ValueError, match="must be above 0"):
        Sampler(temperatures=(1.0, 0.0))


def test_a_sampler_comes_back_from_plain_values() -> None:
    values = {"filter": {"top_k": 3}, "guidance": {"schedule": "listed", "values": [1.0, 2.0]}, "greedy": False}
    assert Sampler.from_values(values) == Sampler(Filter(top_k=3), Guidance(schedule="listed", values=(1.0, 2.0)))
    more = Sampler.from_values({**values, "temperatures": [1.0, 0.5], "smooth": {"start": 0.3}})
    assert more.temperatures == (1.0, 0.5) and more.smooth == Smooth(start=0.3)


def test_a_smooth_draw_mixes_codes_by_a_gumbel_softmax_of_the_filtered_law() -> None:
    """The largest weight is the Gumbel-max draw: it falls on each token for its share (20,000 samples, chi-square)."""
    rows, sampler = 20_000, Sampler(Filter(top_k=4), smooth=Smooth(sharpen=0.0))
    made = prediction(1, branches=1)
    law = sampler.probs(made)[0]
    made.z = made.z.expand(1, rows, 3, 8)
    made.positions, made.index = (places.expand(rows, -1) for places in (made.positions, made.index))
    draw = sampler.draw(made, Noise(0, torch.arange(rows)), round=2)
    made.head.sample(made.z, draw)
    assert_close(draw.soft.sum(-1), torch.ones(rows, 3, dtype=torch.float64))
    counts = torch.stack([torch.bincount(draw.soft[:, place].argmax(-1), minlength=11) for place in range(3)])
    assert (counts[law == 0] == 0).all()
    chi_square = ((counts - rows * law) ** 2 / (rows * law).clamp_min(1e-9))[law > 0].sum()
    assert chi_square < 27.88  # the 0.999 quantile at 3 * (4 - 1) degrees of freedom


def test_the_smooth_temperature_falls_from_scale_to_scale_to_its_floor() -> None:
    smooth = Smooth()
    assert [smooth.temperature(r) for r in (0.0, 0.5, 1.0)] == pytest.approx([0.27, 0.14175, 0.0135])
    assert Smooth(decay=1.0).temperature(1.0) == 0.005
    with pytest.raises(ValueError, match=r"floor is 0\.0; both must be above 0"):
        Smooth(floor=0.0)
