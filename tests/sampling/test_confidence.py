"""Which tokens stay: noise that dies away, annealed draws, and the settings that only some generators read."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from generators.next_token import NextToken
from generators.protocol import Prediction
from heads.categorical import Categorical
from layers.noise import Noise
from layers.spec import Condition, Grid, TokenSpec
from sampling.confidence import Confidence, gumbel
from sampling.decode import generate
from sampling.sampler import Sampler, SamplerDraw

SPEC = TokenSpec(Grid(1, 2, 3), decoded=(1, 8, 12), vocab_size=5)


def prediction(rows: int = 1, step: int = 1, keep: int = 1) -> Prediction:
    """Three unknown positions of six, the same laws in every row, in step `step` of 4."""
    torch.manual_seed(0)
    head = Categorical(8, SPEC).double()
    torch.nn.init.normal_(head.readout.weight)
    z = torch.randn(1, 1, 3, 8, dtype=torch.float64).expand(1, rows, 3, 8)
    positions = torch.tensor([0, 2, 5]).expand(rows, -1)
    return Prediction(head, z, positions, torch.full_like(positions, step), total=4, keep=keep)


def drawn(sampler: Sampler, made: Prediction, round: int = 1) -> tuple[SamplerDraw, Tensor]:
    draw = sampler.draw(made, Noise(0, torch.arange(len(made.positions))), round)
    return draw, made.head.sample(made.z, draw)


def test_tokens_are_drawn_at_the_falling_temperature_of_annealed_logits() -> None:
    """Chi-square over 20,000 samples of 3 positions, seed 0; a right sampler fails it once in 1,000 seeds."""
    rows, made = 20_000, prediction(20_000)
    sampler = Sampler(confidence=Confidence(3.0, "logit", anneal_tokens=True, anneal_logits=True))
    logits = made.head.logits(made.z)[0, 0] / (0.5 + 0.8 * 0.5)  # step 1 of 4: r = 1/2
    law = (logits / (3.0 * 0.5)).softmax(-1)
    assert_close(sampler.probs(prediction())[0], law)
    draw, tokens = drawn(sampler, made)
    assert_close(draw.logit, logits.expand(rows, 3, 5).gather(-1, tokens[..., None])[..., 0])
    counts = torch.stack([torch.bincount(tokens[:, place], minlength=5) for place in range(3)])
    assert ((counts - rows * law) ** 2 / (rows * law)).sum() < 32.91  # the 0.999 quantile at 3 * 4 degrees of freedom


def test_the_last_step_is_greedy_where_tokens_are_annealed() -> None:
    made = prediction(50, step=3, keep=3)
    _, tokens = drawn(Sampler(confidence=Confidence(9.5, anneal_tokens=True)), made)
    assert torch.equal(tokens, made.head.logits(made.z)[0].argmax(-1))
    _, free = drawn(Sampler(confidence=Confidence(9.5)), made)
    assert not torch.equal(free, tokens)


def test_gumbel_noise_decides_which_token_stays_in_proportion_to_its_exponential() -> None:
    """Score over temperature plus Gumbel noise: the best of three is chosen by softmax. Chi-square as above."""
    rows, score = 20_000, torch.tensor([0.3, -1.0, 1.2], dtype=torch.float64)
    made = prediction(rows)
    for how, share in (
        (Confidence(2.0), (score / (2.0 * 0.5)).softmax(-1)),
        (Confidence(score="random"), torch.full((3,), 1 / 3)),
    ):
        draw, _ = drawn(Sampler(confidence=how), made)
        draw.score = score.expand(rows, 3)
        kept = draw.keep(made)
        assert (kept.sum(1) == 1).all()
        assert ((kept.sum(0) - rows * share) ** 2 / (rows * share)).sum() < 13.82  # 2 degrees of freedom


def test_noise_dies_away_until_the_best_stay_ties_by_index() -> None:
    made = prediction(4, step=3, keep=2)
    draw, _ = drawn(Sampler(confidence=Confidence(50.0, "logit")), made)
    draw.logit = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0], [2.0, 1.0, 2.0], [0.0, 5.0, 0.0]])
    kept = [row.nonzero().flatten().tolist() for row in draw.keep(made)]
    assert kept == [[1, 2], [0, 1], [0, 2], [0, 1]]


def test_a_place_that_may_stay_open_is_drawn_anew_in_every_round() -> None:
    made = prediction(50)
    rounds = [drawn(Sampler(), made, round)[1] for round in range(3)]
    assert not torch.equal(rounds[0], rounds[1]) and not torch.equal(rounds[1], rounds[2])
    assert torch.equal(rounds[1], drawn(Sampler(), made, 1)[1])
    last = replace(made, keep=3)
    assert torch.equal(drawn(Sampler(), last, 0)[1], drawn(Sampler(), last, 7)[1])


def test_gumbel_numbers_are_finite_at_the_ends_of_the_unit_interval() -> None:
    u = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert gumbel(u).isfinite().all() and gumbel(u)[1].item() == pytest.approx(0.36651292058)


def test_settings_come_back_from_plain_values_and_are_checked() -> None:
    plain = {
        "filter": {},
        "guidance": {},
        "greedy": False,
        "confidence": {"temperature": 2.0},
        "rounds": 4,
        "reveal": "cosine",
    }
    assert Sampler.from_values(plain) == Sampler(confidence=Confidence(2.0), rounds=4, reveal="cosine")
    with pytest.raises(ValueError, match=r"temperature is -1\.0, must be at least 0"):
        Confidence(-1.0)
    with pytest.raises(ValueError, match="score is 'logits', must be log_prob, logit or random"):
        Confidence(score="logits")


def test_rounds_are_refused_by_an_order_that_has_its_own() -> None:
    model, condition = NextToken(SPEC, 8, 1, 1, num_classes=2), Condition(label=torch.tensor([0]))
    with pytest.raises(ValueError, match=r"sampler\.rounds is 4, but NextToken lets no one choose it"):
        generate(model, condition, Sampler(rounds=4), Noise(0, torch.arange(1)))
