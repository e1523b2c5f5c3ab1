"""The next-token generator: causality, the cache against teacher forcing, score and rewind, independence of the batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from generators.next_token import NextToken
from layers.noise import Noise
from layers.spec import Condition, Grid, Sequence, TokenSpec
from sampling.decode import generate
from sampling.filters import Filter
from sampling.guidance import Guidance
from sampling.sampler import Sampler

SPEC = TokenSpec(Grid(1, 4, 5), decoded=(1, 16, 20), vocab_size=37)


def randomised(dtype: torch.dtype = torch.float64, **settings: object) -> NextToken:
    """A small model in which every parameter is random, norms and zero-initialised read-outs too."""
    torch.manual_seed(0)
    model = NextToken(**{"spec": SPEC, "dim": 32, "depth": 2, "heads": 4, "num_classes": 6, **settings})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def labels(*values: int) -> Condition:
    return Condition(label=torch.tensor(values))


def captions(rows: int, dtype: torch.dtype = torch.float64) -> Condition:
    """Six text slots, padded on the left by a different amount in every row."""
    text = torch.randn(rows, 6, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)
    mask = torch.arange(6) >= torch.arange(rows)[:, None]
    return Condition(text=text * mask[..., None], text_mask=mask)


def tokens(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(37, (rows, 20), generator=torch.Generator().manual_seed(seed))


CONDITIONS = {
    "class": (labels(0, 5, 2), {}),
    "text": (captions(3), {"num_classes": None, "text_dim": 8, "text_slots": 6}),
}


@pytest.mark.parametrize("kind", CONDITIONS)
def test_a_row_of_logits_depends_on_earlier_tokens_only(kind: str) -> None:
    condition, settings = CONDITIONS[kind]
    model, given = randomised(**settings), tokens(3)
    before = model.logits(given, condition)
    for place in (0, 7, 18):
        changed = given.clone()
        changed[:, place] = (changed[:, place] + 1) % 37
        after = model.logits(changed, condition)
        assert_close(after[:, : place + 1], before[:, : place + 1])
        assert ((after - before).abs().amax(-1) > 1e-6)[:, place + 1 :].all()


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_decoding_with_the_cache_equals_teacher_forcing(kind: str, kv_heads: int | None) -> None:
    condition, settings = CONDITIONS[kind]
    model, given = randomised(kv_heads=kv_heads, **settings), tokens(3)
    full = model.logits(given, condition), model.logits(given, condition.null())
    state = model.begin([condition, condition.null()], Noise(0, torch.arange(3)))
    for place in range(20):
        prediction = model.step(state)
        again = model.step(state)  # reveals nothing, says the same
        assert torch.equal(prediction.z, again.z)
        found = prediction.head.logits(prediction.z)[:, :, 0]
        assert_close(found, torch.stack([branch[:, place] for branch in full]))
        assert torch.equal(prediction.positions, torch.full((3, 1), place))
        model.commit(state, prediction.positions, given[:, place : place + 1])
    assert state.known.all() and torch.equal(state.tokens, given) and state.nfe == 40


@pytest.mark.parametrize("kind", CONDITIONS)
def test_score_gives_the_law_of_every_drafted_token_and_of_the_one_after(kind: str) -> None:
    condition, settings = CONDITIONS[kind]
    model, given = randomised(**settings), tokens(3)
    full = model.logits(given, condition)
    state = model.begin([condition], Noise(0, torch.arange(3)))
    wrong = tokens(3, seed=9)
    kept = torch.tensor([0, 3, 5])  # accepted drafts differ from row to row: a ragged batch
    prediction = model.score(state, torch.where(torch.arange(5) < kept[:, None], given[:, :5], wrong[:, :5]))
    laws = prediction.head.logits(prediction.z)[0]
    for row, n in enumerate(kept.tolist()):
        assert_close(laws[row, : n + 1], full[row, : n + 1])
    keep = torch.arange(6) <= kept[:, None]  # the accepted drafts and one correction
    model.commit(state, prediction.positions, given[:, :6], keep)
    assert torch.equal(state.length, kept + 1)
    for offset in range(1, 6):  # rejected rows of the cache are written again
        prediction = model.step(state)
        place = kept + offset
        assert torch.equal(prediction.positions[:, 0], place)
        assert_close(prediction.head.logits(prediction.z)[0, :, 0], full[torch.arange(3), place])
        model.commit(state, prediction.positions, given.gather(1, place[:, None]))


@pytest.mark.parametrize("to", [[0, 0, 0], [0, 4, 9], [2, 2, 7]])
def test_rewind_forgets_all_but_the_first_tokens(to: list[int]) -> None:
    model, given, condition = randomised(), tokens(3), labels(0, 5, 2)
    full = model.logits(given, condition)
    state = model.begin([condition], Noise(0, torch.arange(3)))
    for place in range(9):
        model.commit(state, model.step(state).positions, given[:, place : place + 1])
    model.rewind(state, torch.tensor(to))
    assert torch.equal(state.length, torch.tensor(to)) and torch.equal(state.known.sum(1), state.length)
    assert (state.tokens[~state.known] == 0).all()
    prediction = model.step(state)
    assert_close(prediction.head.logits(prediction.z)[0, :, 0], full[torch.arange(3), torch.tensor(to)])


def test_padded_text_influences_nothing() -> None:
    model, condition = randomised(**CONDITIONS["text"][1]), captions(3)
    noise = torch.where(condition.text_mask[..., None], 0.0, 7.0)
    assert_close(
        model.logits(tokens(3), condition),
        model.logits(tokens(3), Condition(text=condition.text + noise, text_mask=condition.text_mask)),
    )


def test_sampling_stays_the_same_whatever_the_batch_in_float64() -> None:
    model = randomised()
    sampler = Sampler(Filter(temperature=1.2, top_k=20, top_p=0.95), Guidance(scale=2.0))
    index = torch.arange(64)
    condition = Condition(label=index % 6)
    whole = generate(model, condition, sampler, Noise(3, index)).tokens
    for size in (1, 16):
        for start in range(0, 64, 16):
            rows = slice(start, start + size)
            part = generate(model, condition.select(rows), sampler, Noise(3, index[rows])).tokens
            assert torch.equal(part, whole[rows])


def test_first_differences_in_float32_have_a_small_decision_margin(
    record_property: Callable[[str, object], None],
) -> None:
    """Batch 1 against batch 64: where a sample first differs, its uniform lay within 1e-5 of a boundary of the law."""
    model = randomised(torch.float32)
    sampler, index = Sampler(Filter(top_k=20), Guidance(scale=3.0)), torch.arange(64)
    condition = Condition(label=index % 6)
    whole = generate(model, condition, sampler, Noise(5, index)).tokens
    differing = 0
    for row in range(64):
        rows = slice(row, row + 1)
        alone = generate(model, condition.select(rows), sampler, Noise(5, index[rows])).tokens
        places = (alone != whole[rows])[0].nonzero()
        if len(places):
            differing += 1
            assert _margin(model, sampler, condition.select(rows), alone, int(places[0]), Noise(5, index[rows])) < 1e-5
    record_property("rows_that_differ", differing)


def _margin(model: NextToken, sampler: Sampler, given: Condition, tokens: Tensor, place: int, noise: Noise) -> float:
    """How far the uniform of the token at `place` lay from the nearest boundary of its cumulative law."""
    rows = torch.stack([model.logits(tokens, branch)[:, [place]] for branch in (given, given.null())])
    prediction = model.step(model.begin([given], noise))
    prediction.positions = prediction.index = torch.tensor([[place]])
    law = sampler.law(sampler.guide(prediction, rows))
    u = noise.uniform("token", prediction.positions)
    return float((law.cumsum(-1) - u[..., None]).abs().min())


def test_fixed_tokens_are_imposed_and_seen() -> None:
    model, condition, given = randomised(), labels(1, 2), tokens(2)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(2)) < 0.5
    noise = Noise(0, torch.arange(2))
    made = generate(model, condition, Sampler(), noise, fixed=(given, mask)).tokens
    assert torch.equal(made[mask], given[mask])
    assert not torch.equal(made, generate(model, condition, Sampler(), noise).tokens)


def test_a_prefix_is_the_beginning_of_the_whole() -> None:
    model, condition, noise = randomised(), labels(1, 2), Noise(0, torch.arange(2))
    whole, seen = generate(model, condition, Sampler(), noise).tokens, []
    part = generate(model, condition, Sampler(), noise, length=7, preview=lambda state: seen.append(state.round))
    assert torch.equal(part.tokens[:, :7], whole[:, :7]) and (part.tokens[:, 7:] == 0).all()
    assert not part.known[:, 7:].any() and seen == list(range(1, 8))


def test_the_condition_is_dropped_at_the_stated_rate_in_training_only() -> None:
    model, given, condition = randomised(dropout=0.0, token_dropout=0.0), tokens(4), labels(0, 1, 2, 3)
    kept, _ = model.loss(given, condition)
    null, _ = model.loss(given, condition, keep=torch.zeros(4, dtype=torch.bool))
    assert_close(null, model.loss(given, labels(6, 6, 6, 6))[0])
    model.condition_drop = 1.0
    assert torch.equal(model.loss(given, condition)[0], kept)
    assert_close(model.train().loss(given, condition)[0], null)


def test_half_precision_leaves_the_angles_whole() -> None:
    whole, half = randomised(torch.float32), randomised(torch.bfloat16)
    assert half.embed.weight.dtype == torch.bfloat16 and half.rotary.dtype == torch.float32
    assert torch.equal(half.rotary, whole.rotary)
    state = generate(half, labels(1, 2), Sampler(guidance=Guidance(scale=2.0)), Noise(0, torch.arange(2)))
    assert state.known.all() and int(state.tokens.max()) < 37


def test_an_untrained_model_is_uniform() -> None:
    model = NextToken(SPEC, dim=32, depth=1, heads=2, num_classes=3)
    loss, parts = model.eval().loss(tokens(2), labels(0, 1))
    assert_close(loss, torch.tensor(37.0).log()) and parts.keys() == {"cross_entropy"}


def test_compiled_decoding_gives_the_same_tokens() -> None:
    model, condition, noise = randomised(depth=1), labels(1, 2), Noise(0, torch.arange(2))
    sampler = Sampler(Filter(top_k=20), Guidance(scale=2.0))
    eager = generate(model, condition, sampler, noise).tokens
    model.trunk.compile(dynamic=False)
    assert torch.equal(generate(model, condition, sampler, noise).tokens, eager)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spec": TokenSpec(Sequence(4), (1, 8, 8), channels=3)}, "discrete.*continuous"),
        ({"num_classes": None}, "num_classes or text_dim"),
        ({"heads": 5}, "heads=5 must divide dim=32"),
        ({"dim": 36, "heads": 6}, "head_dim is 6"),
    ],
)
def test_what_cannot_be_served_is_refused_at_construction(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NextToken(**{"spec": SPEC, "dim": 32, "depth": 1, "heads": 4, "num_classes": 6, **settings})


def test_bad_requests_name_the_value_and_the_range() -> None:
    model, noise = randomised(), Noise(0, torch.arange(1))
    with pytest.raises(ValueError, match="class id 6 is out of range: this model knows 0 to 5"):
        model.begin([labels(6)], noise)
    with pytest.raises(ValueError, match="class-conditional"):
        model.begin([captions(1)], noise)
    with pytest.raises(ValueError, match="length is 21, this generator makes 1 to 20"):
        model.begin([labels(0)], noise, length=21)
    with pytest.raises(ValueError, match="ask `score`"):
        model.step(model.begin([labels(0)], noise), ahead=2)
