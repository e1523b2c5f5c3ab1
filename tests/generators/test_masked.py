"""The masked generator: what it sees, which tokens enter when, in-painting, independence of the batch, its training."""

from functools import partial
from math import acos, cos, pi

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from generators.masked import SCHEDULES, Masked, reveal_plan
from heads.categorical import Categorical
from layers.condition import LabelError
from layers.noise import Noise
from layers.record import UnknownName
from layers.spec import Condition, Grid, Sequence, TokenSpec
from sampling.confidence import Confidence
from sampling.decode import generate
from sampling.guidance import Guidance
from sampling.sampler import Sampler

SPEC = TokenSpec(Grid(1, 3, 4), decoded=(1, 12, 16), vocab_size=19)
LABELS = Condition(label=torch.tensor([0, 5, 2]))
TITOK = Confidence(4.5, "logit", anneal_tokens=True, anneal_logits=True)


def randomised(backbone: str = "uvit", spec: TokenSpec = SPEC, **settings: object) -> Masked:
    """A small model in float64 in which every parameter is random, norms and zero-initialised read-outs too."""
    torch.manual_seed(0)
    head = partial(Categorical, bias=True)
    model = Masked(
        **{"spec": spec, "dim": 16, "depth": 2, "heads": 2, "num_classes": 6, "head": head, **settings},
        backbone=backbone,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def tokens(rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(19, (rows, 12), generator=torch.Generator().manual_seed(seed))


def noise(*index: int, seed: int = 0) -> Noise:
    return Noise(seed, torch.tensor(index))


# ---- what it sees


@pytest.mark.parametrize("backbone", ["bert", "uvit"])
def test_hidden_tokens_influence_nothing_and_the_others_every_position(backbone: str) -> None:
    model, given, mask = randomised(backbone), tokens(), torch.zeros(3, 12, dtype=torch.bool)
    mask[:, [1, 6]] = True
    before = model.logits(given, LABELS, mask)
    assert_close(model.logits(torch.where(mask, (given + 1) % 19, given), LABELS, mask), before, rtol=0, atol=0)
    changed = given.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 19
    assert ((model.logits(changed, LABELS, mask) - before).abs().amax(-1) > 1e-6).all()
    assert ((model.logits(given, LABELS.null(), mask) - before).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("layout", [Sequence(12), Grid(3, 2, 2)])
def test_any_layout_is_served(layout: Sequence | Grid) -> None:
    model = randomised(spec=TokenSpec(layout, decoded=(1, 8, 8), vocab_size=19))
    assert generate(model, LABELS, Sampler(), noise(0, 1, 2)).known.all()


# ---- rounds


def test_the_plan_follows_the_schedule_of_the_original() -> None:
    assert reveal_plan(16, 8, "arccos") == tuple(enumerate([14, 13, 12, 10, 9, 7, 5, 0]))
    assert reveal_plan(16, 4, "cosine") == tuple(enumerate([14, 11, 6, 0]))
    assert reveal_plan(16, 1, "arccos") == ((0, 0),)
    assert reveal_plan(3, 6, "arccos") == ((0, 2), (1, 1), (5, 0))  # one token waits for the last step
    assert reveal_plan(1, 3, "linear") == ((2, 0),)
    assert reveal_plan(0, 5, "linear") == ()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_fall_from_all_to_none(name: str) -> None:
    share = SCHEDULES[name](torch.linspace(0, 1, 101, dtype=torch.float64))
    assert_close(share[[0, -1]], torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-12, rtol=0)
    assert (share.diff() < 0).all()
    if name in ("arccos", "cosine"):
        assert_close(share[30].item(), {"arccos": acos(0.3) / (pi / 2), "cosine": cos(0.3 * pi / 2)}[name])


@pytest.mark.parametrize("rounds", [1, 3, 8, 12, 30])
def test_every_round_reveals_what_the_plan_says_and_changes_nothing_known(rounds: int) -> None:
    model, sampler = randomised(), Sampler(confidence=TITOK)
    state = model.begin([LABELS, LABELS.null()], noise(0, 1, 2), rounds=rounds)
    plan = reveal_plan(12, rounds, "arccos")
    assert state.rounds == len(plan)
    for turn, (step, after) in enumerate(plan):
        known, before = state.known.clone(), state.tokens.clone()
        prediction, again = model.step(state), model.step(state)
        assert torch.equal(prediction.z, again.z) and torch.equal(prediction.positions, again.positions)
        assert not known.gather(1, prediction.positions).any() and prediction.positions.shape == (3, state.left)
        assert (prediction.index == step).all() and prediction.total == rounds
        draw = sampler.draw(prediction, noise(0, 1, 2), turn)
        made = prediction.head.sample(prediction.z, draw)
        model.commit(state, prediction.positions, made, draw.keep(prediction))
        assert (state.known.sum(1) == 12 - after).all() and torch.equal(state.length, state.known.sum(1))
        assert state.known[known].all() and torch.equal(state.tokens[known], before[known])
    assert state.known.all() and state.nfe == 2 * len(plan)
    with pytest.raises(ValueError, match="rounds are committed"):
        model.step(state)


def test_a_step_gives_the_teacher_forced_laws_of_the_unknown_in_layout_order() -> None:
    model, given = randomised(), tokens()
    state = model.begin([LABELS, LABELS.null()], noise(0, 1, 2), rounds=3)
    places = torch.tensor([[4, 0], [7, 11], [2, 3]])
    model.commit(state, places, given.gather(1, places))
    mask = torch.ones(3, 12, dtype=torch.bool).scatter_(1, places, False)
    prediction = model.step(state)
    assert torch.equal(prediction.positions, mask.nonzero()[:, 1].reshape(3, 10))
    for branch, condition in enumerate((LABELS, LABELS.null())):
        full = model.logits(given, condition, mask)
        assert_close(prediction.head.logits(prediction.z[branch]), full[mask].reshape(3, 10, 19))


# ---- samplers


@pytest.mark.parametrize("confidence", [Confidence(), Confidence(2.0), TITOK])
def test_a_sample_is_the_same_whatever_its_batch(confidence: Confidence) -> None:
    model, sampler = randomised(), Sampler(guidance=Guidance(2.0), confidence=confidence)
    label = torch.tensor([0, 5, 2, 1, 3])
    together = generate(model, Condition(label=label), sampler, noise(0, 1, 2, 3, 4)).tokens
    for rows in ([3], [4, 1]):
        alone = generate(model, Condition(label=label[rows]), sampler, noise(*rows)).tokens
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("guidance", [Guidance(1.0), Guidance(0.0, rule="muse"), Guidance(0.0, "titok_linear", "muse")])
def test_neutral_guidance_is_the_conditional_branch_alone(guidance: Guidance) -> None:
    model = randomised()
    state = model.begin([LABELS, LABELS.null()], noise(0, 1, 2), rounds=5)
    prediction = model.step(state)
    two = Sampler(guidance=guidance).guide(prediction, prediction.head.logits(prediction.z))
    assert_close(two, prediction.head.logits(prediction.z[0]))
    found = generate(model, LABELS, Sampler(guidance=guidance, rounds=5), noise(0, 1, 2))
    assert torch.equal(found.tokens, generate(model, LABELS, Sampler(rounds=5), noise(0, 1, 2)).tokens)
    assert found.nfe == 5


def test_at_temperature_0_decoding_is_greedy_and_asks_for_no_noise() -> None:
    model, cold = randomised(), Confidence(0.0, "logit", anneal_tokens=True)
    greedy = generate(model, LABELS, Sampler(greedy=True, confidence=Confidence(score="logit")), noise(0, 1, 2)).tokens
    for seed in range(3):
        found = generate(model, LABELS, Sampler(confidence=cold), noise(7, 8, 9, seed=seed)).tokens
        assert torch.equal(found, greedy)
    first = model.logits(greedy, LABELS, torch.ones(3, 12, dtype=torch.bool)).max(-1)
    best = first.values.topk(2).indices  # the first of 8 rounds reveals the two highest logits
    assert torch.equal(greedy.gather(1, best), first.indices.gather(1, best))


def test_one_token_a_round_in_random_order_samples_the_mean_of_all_orders() -> None:
    """Chi-square over 20,000 samples, seed 0; a right decoder fails it once in 1,000 seeds."""
    model = randomised(spec=TokenSpec(Sequence(2), decoded=(1, 4, 4), vocab_size=3), num_classes=1)
    a, b = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(1)
    pairs, condition = torch.stack((a, b), 1), Condition(label=torch.zeros(9, dtype=torch.int64))
    law = torch.zeros(9, dtype=torch.float64)
    for first, second in ((0, 1), (1, 0)):
        both, mask = torch.ones(9, dtype=torch.float64), torch.ones(9, 2, dtype=torch.bool)
        for place in (first, second):
            probs = model.logits(pairs, condition, mask).softmax(-1)[torch.arange(9), place, pairs[:, place]]
            both = both * probs
            mask[:, place] = False
        law += both / 2
    sampler = Sampler(confidence=Confidence(score="random"), rounds=2)
    condition = Condition(label=torch.zeros(20_000, dtype=torch.int64))
    made = generate(model, condition, sampler, Noise(0, torch.arange(20_000))).tokens
    counts = torch.bincount(3 * made[:, 0] + made[:, 1], minlength=9)
    assert_close(law.sum().item(), 1.0)
    assert ((counts - 20_000 * law) ** 2 / (20_000 * law)).sum() < 26.12  # the 0.999 quantile at 8 degrees of freedom


# ---- in-painting


def test_given_tokens_stay_and_are_seen_from_the_first_round() -> None:
    model, given = randomised(), tokens(seed=3)
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[0, :5], mask[1, 5:10], mask[2, [0, 3, 6, 9, 11]] = True, True, True
    state = model.begin([LABELS], noise(0, 1, 2), fixed=(given, mask))
    law = model.step(state)
    assert_close(law.head.logits(law.z[0]), model.logits(given, LABELS, ~mask)[~mask].reshape(3, 7, 19))
    found = generate(model, LABELS, Sampler(confidence=TITOK), noise(0, 1, 2), fixed=(given, mask))
    assert (
        torch.equal(found.tokens[mask], given[mask])
        and found.known.all()
        and found.nfe == len(reveal_plan(7, 8, "arccos"))
    )
    free = generate(model, LABELS, Sampler(confidence=TITOK), noise(0, 1, 2))
    assert not torch.equal(found.tokens[~mask], free.tokens[~mask])
    whole = generate(model, LABELS, Sampler(), noise(0, 1, 2), fixed=(given, torch.ones_like(mask)))
    assert torch.equal(whole.tokens, given) and whole.nfe == 0


def test_rows_that_fix_different_numbers_of_tokens_are_refused() -> None:
    mask = torch.arange(12) < torch.tensor([[3], [4], [8]])
    with pytest.raises(ValueError, match="fixed leaves 4 to 9 tokens of a row to make"):
        randomised().begin([LABELS], noise(0, 1, 2), fixed=(tokens(), mask))


# ---- training


@pytest.mark.parametrize(("name", "mean"), [("arccos", 2 / pi), ("cosine", 2 / pi), ("linear", 0.5), ("square", 2 / 3)])
def test_training_hides_the_share_of_its_schedule_anywhere(name: str, mean: float) -> None:
    """Means over 20,000 rows, seed 0, within 5 standard errors, all below 0.5 / sqrt(20,000)."""
    spec = TokenSpec(Sequence(100), decoded=(1, 4, 4), vocab_size=2)
    model = Masked(spec, 8, 1, 1, num_classes=1, mask_schedule=name)
    torch.manual_seed(0)
    mask = model.draw_mask(20_000, torch.device("cpu")).double()
    assert mask.sum(1).min() >= 1
    assert abs(mask.mean() - mean) < 0.018 and (mask.mean(0) - mean).abs().max() < 0.018


def test_the_loss_is_the_weighted_mean_of_the_smoothed_cross_entropy() -> None:
    model, given = randomised(label_smoothing=0.2, visible_weight=0.3), tokens()
    mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.6
    keep = torch.tensor([True, False, True])
    logs = model.logits(given, Condition(label=LABELS.label, keep=keep), mask).log_softmax(-1)
    nats = -0.8 * logs.gather(-1, given[..., None])[..., 0] - 0.2 * logs.mean(-1)
    weight = torch.where(mask, 1.0, 0.3).double()
    loss, parts = model.loss(given, LABELS, mask=mask, keep=keep)
    assert_close(loss, (weight * nats).sum() / weight.sum())
    assert_close((parts["hidden"], parts["visible"]), (nats[mask].mean(), nats[~mask].mean()))
    sharp = randomised(label_smoothing=0.0, visible_weight=0.0).loss(given, LABELS, mask=mask, keep=keep)[0]
    assert_close(sharp, -logs.gather(-1, given[..., None])[..., 0][mask].mean())


@pytest.mark.parametrize("backbone", ["bert", "uvit"])
def test_a_tiny_set_is_learned_and_sampled(backbone: str) -> None:
    torch.manual_seed(0)
    known, label = tokens(4, seed=5), torch.tensor([0, 1, 2, 3])
    sizes = {"dim": 32, "depth": 2, "heads": 2, "num_classes": 4}
    model = Masked(SPEC, **sizes, backbone=backbone, dropout=0.0, attention_dropout=0.0, label_smoothing=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss, _ = model.loss(known.repeat(4, 1), Condition(label=label.repeat(4)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    model.eval()
    made = generate(model, Condition(label=label.repeat(8)), Sampler(), Noise(0, torch.arange(32))).tokens
    assert (made == known.repeat(8, 1)).double().mean() > 0.9
    cold = generate(model, Condition(label=label), Sampler(greedy=True), noise(0, 1, 2, 3)).tokens
    assert torch.equal(cold, known)


# ---- refusals


def test_what_cannot_be_served_is_refused_by_name() -> None:
    make = partial(Masked, dim=8, depth=1, heads=1, num_classes=2)
    with pytest.raises(ValueError, match="discrete tokens, the tokenizer makes continuous ones"):
        make(TokenSpec(Grid(1, 2, 2), decoded=(1, 8, 8), channels=4))
    with pytest.raises(ValueError, match="give num_classes"):
        make(SPEC, num_classes=None)
    with pytest.raises(UnknownName, match="backbone 'uvitt' is not known; did you mean 'uvit'"):
        make(SPEC, backbone="uvitt")
    with pytest.raises(UnknownName, match="mask schedule 'arcos'"):
        make(SPEC, mask_schedule="arcos")
    model = make(SPEC)
    begin = partial(model.begin, [Condition(label=torch.tensor([1]))], noise(0))
    for wrong, match in (
        ({"rounds": 0}, "rounds is 0"),
        ({"length": 3}, "always makes all 12"),
        ({"reveal": "no"}, "schedule"),
    ):
        with pytest.raises(ValueError, match=match):
            begin(**wrong)
    with pytest.raises(LabelError, match="class id 2 is out of range"):
        model.begin([Condition(label=torch.tensor([2]))], noise(0))
    with pytest.raises(ValueError, match="all unknown tokens a step"):
        model.step(begin(), ahead=2)
