"""The neighboring generator: the order, who sees whom, the mean of the read-outs, the cache, independence of the batch."""

from functools import partial
from math import prod

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import generators
from generators.neighboring import Neighboring
from heads.categorical import Categorical
from heads.neighbour import Neighbour
from layers.noise import Noise
from layers.packed import pack_linears
from layers.spec import Condition, Grid, Sequence, TokenSpec
from sampling.decode import generate
from sampling.filters import Filter
from sampling.guidance import Guidance
from sampling.sampler import Sampler

GRIDS = [(1, 1, 1), (1, 1, 5), (1, 4, 4), (1, 3, 5), (2, 3, 4), (4, 2, 2), (3, 1, 1)]
SPEC = TokenSpec(Grid(1, 3, 4), decoded=(1, 12, 16), vocab_size=37)
CLIP = TokenSpec(Sequence(24), decoded=(4, 12, 16), vocab_size=37)
FAMILY = {
    "class": {},
    "text": {"num_classes": None, "text_dim": 8, "text_slots": 6, "kv_heads": 2},
    "clip": {"spec": CLIP, "layout": (2, 3, 4), "positions": "learned", "axis_depth": 2},
    "three axes, one frame": {"head": partial(Neighbour, axes=3), "kv_heads": 1},
    "fixed places": {"spec": CLIP, "layout": (2, 4, 3), "positions": "sincos", "axis_depth": 0},
}


def randomised(dtype: torch.dtype = torch.float64, **settings: object) -> Neighboring:
    """A small model in which every parameter is random, norms and zero-initialised read-outs too."""
    torch.manual_seed(0)
    model = Neighboring(**{"spec": SPEC, "dim": 32, "depth": 2, "heads": 4, "num_classes": 6, **settings})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def conditions(kind: str, rows: int = 3) -> Condition:
    if kind != "text":
        return Condition(label=torch.arange(rows) % 6)
    text = torch.randn(rows, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.arange(6) >= torch.arange(rows)[:, None] % 5  # padded on the left, by row
    return Condition(text=text * mask[..., None], text_mask=mask)


def tokens(model: Neighboring, rows: int, seed: int = 0) -> Tensor:
    return torch.randint(37, (rows, model.spec.length), generator=torch.Generator().manual_seed(seed))


# ---- the order


@pytest.mark.parametrize("size", GRIDS)
def test_rounds_are_the_diagonals_and_share_out_all_tokens(size: tuple[int, int, int]) -> None:
    spec = TokenSpec(Grid(*size), decoded=(1, 8, 8), vocab_size=37)
    model = Neighboring(spec, dim=8, depth=1, heads=1, num_classes=2, positions="learned")
    seen: list[Tensor] = []
    state = model.begin([Condition(label=torch.tensor([0, 1]))], Noise(0, torch.arange(2)))
    assert state.rounds == 1 + sum(n - 1 for n in size)
    for distance in range(state.rounds):
        prediction = model.step(state)
        place = prediction.positions[0]
        t, h, w = place // (size[1] * size[2]), place // size[2] % size[1], place % size[2]
        assert (t + h + w == distance).all() and torch.equal(place, place.sort().values)
        assert (prediction.index == distance).all() and prediction.total == state.rounds
        seen.append(place)
        model.commit(state, prediction.positions, torch.zeros_like(prediction.positions))
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(prod(size)))
    assert state.known.all() and state.nfe == state.rounds and (state.length == prod(size)).all()


@pytest.mark.parametrize(("n", "rounds"), [(4, 7), (16, 31), (24, 47)])
def test_a_square_takes_2n_minus_1_rounds(n: int, rounds: int) -> None:
    spec = TokenSpec(Grid(1, n, n), decoded=(1, n, n), vocab_size=5)
    model = Neighboring(spec, dim=8, depth=1, heads=1, num_classes=2)
    assert model.begin([Condition(label=torch.tensor([0]))], Noise(0, torch.arange(1))).rounds == rounds == 2 * n - 1


# ---- who sees whom


@pytest.mark.parametrize("kind", FAMILY)
def test_a_law_depends_on_exactly_the_tokens_that_are_nearer(kind: str) -> None:
    model = randomised(**FAMILY[kind])
    given, condition = tokens(model, 3), conditions(kind)
    before, distance = model.logits(given, condition), model.when[model.condition.slots :]
    for place in range(0, model.spec.length, 5):
        changed = given.clone()
        changed[:, place] = (changed[:, place] + 1) % 37
        moved = (model.logits(changed, condition) - before).abs().amax(-1)
        later = distance > distance[place]
        assert (moved[:, ~later] < 1e-12).all() and (moved[:, later] > 1e-6).all()


@pytest.mark.parametrize("kind", FAMILY)
def test_tokens_of_one_round_see_each_other_in_both_directions(kind: str) -> None:
    model = randomised(**FAMILY[kind])
    given, condition, first = tokens(model, 3), conditions(kind), model.condition.slots
    before, diagonal = model.states(given, condition)[:, first:], model._places(2)
    for place in (diagonal[0], diagonal[-1]):
        changed = given.clone()
        changed[:, place] = (changed[:, place] + 1) % 37
        moved = (model.states(changed, condition)[:, first:] - before).abs().amax((-1, -2))
        assert (moved[:, diagonal] > 1e-6).all() and (moved[:, model._places(1)] < 1e-12).all()


def test_padded_text_influences_nothing() -> None:
    model, condition = randomised(**FAMILY["text"]), conditions("text")
    noise = torch.where(condition.text_mask[..., None], 0.0, 7.0)
    changed = Condition(text=condition.text + noise, text_mask=condition.text_mask)
    assert_close(model.logits(tokens(model, 3), condition), model.logits(tokens(model, 3), changed))


# ---- the laws


@pytest.mark.parametrize("kind", FAMILY)
def test_a_law_is_the_mean_of_what_the_neighbours_say(kind: str) -> None:
    model = randomised(**FAMILY[kind])
    given, condition, first = tokens(model, 3), conditions(kind), model.condition.slots
    said, laws = model.head.by_axis(model.states(given, condition)), model.logits(given, condition)
    assert_close(laws[:, 0], said[:, :, first - 1].mean(0))
    grid = model.grid
    for place in range(1, model.spec.length):
        t, rest = divmod(place, grid.h * grid.w)
        h, w = divmod(rest, grid.w)
        behind = [(0, 1)] * (w > 0) + [(1, grid.w)] * (h > 0) + [(2, grid.h * grid.w)] * (t > 0)
        expected = torch.stack([said[axis, :, first + place - stride] for axis, stride in behind]).mean(0)
        assert_close(laws[:, place], expected)


@pytest.mark.parametrize("kind", FAMILY)
def test_decoding_with_the_cache_equals_teacher_forcing(kind: str) -> None:
    model = randomised(**FAMILY[kind])
    given, condition = tokens(model, 3), conditions(kind)
    full = torch.stack([model.logits(given, condition), model.logits(given, condition.null())])
    state = model.begin([condition, condition.null()], Noise(0, torch.arange(3)))
    for _ in range(state.rounds):
        prediction = model.step(state)
        assert torch.equal(prediction.z, model.step(state).z)  # reveals nothing, says the same
        place = prediction.positions[0]
        assert_close(prediction.head.logits(prediction.z), full[:, :, place], atol=1e-11, rtol=0)
        model.commit(state, prediction.positions, given[:, place])
    assert torch.equal(state.tokens, given)
    with pytest.raises(ValueError, match=f"all {state.rounds} diagonals are committed"):
        model.step(state)


@pytest.mark.parametrize("kind", FAMILY)
def test_sampling_stays_the_same_whatever_the_batch_in_float64(kind: str) -> None:
    model, condition, index = randomised(**FAMILY[kind]), conditions(kind, 32), torch.arange(32)
    sampler = Sampler(Filter(temperature=1.2, top_k=20, top_p=0.95), Guidance(scale=2.0))
    whole = generate(model, condition, sampler, Noise(3, index)).tokens
    for size in (1, 8):
        for start in range(0, 32, 8):
            rows = slice(start, start + size)
            part = generate(model, condition.select(rows), sampler, Noise(3, index[rows])).tokens
            assert torch.equal(part, whole[rows])


def test_fixed_tokens_are_imposed_and_seen() -> None:
    """The first frame of a clip is given: the second is made after it."""
    model, condition, noise = randomised(**FAMILY["clip"]), conditions("clip"), Noise(0, torch.arange(3))
    given, mask = tokens(model, 3), (torch.arange(24) < 12).expand(3, -1)
    made = generate(model, condition, Sampler(), noise, fixed=(given, mask)).tokens
    assert torch.equal(made[mask], given[mask])
    assert not torch.equal(made[:, 12:], generate(model, condition, Sampler(), noise).tokens[:, 12:])


def test_some_diagonals_are_the_beginning_of_the_whole() -> None:
    model, condition, noise = randomised(), conditions("class"), Noise(0, torch.arange(3))
    whole = generate(model, condition, Sampler(), noise).tokens
    part = generate(model, condition, Sampler(), noise, length=6)
    assert torch.equal(part.tokens[part.known], whole[part.known]) and (part.known.sum(1) == 6).all()
    with pytest.raises(ValueError, match="length is 7, whole diagonals end at 1, 3, 6, 9, 11, 12"):
        model.begin([condition], noise, length=7)


# ---- training


def test_the_condition_is_dropped_at_the_stated_rate_in_training_only() -> None:
    model, condition = randomised(dropout=0.0, token_dropout=0.0), conditions("class")
    given, null = tokens(model, 3), Condition(label=torch.full((3,), 6))
    kept, _ = model.loss(given, condition)
    model.condition_drop = 1.0
    assert torch.equal(model.loss(given, condition)[0], kept)
    assert_close(model.train().loss(given, condition)[0], model.loss(given, null, keep=torch.ones(3).bool())[0])


def test_a_few_pictures_are_learnt_by_heart() -> None:
    torch.manual_seed(0)
    model = Neighboring(SPEC, dim=32, depth=1, heads=2, num_classes=4, mlp_hidden=64, dropout=0.0, token_dropout=0.0)
    given, condition = tokens(model, 4), Condition(label=torch.arange(4))
    assert_close(model.loss(given, condition)[0], torch.tensor(37.0).log())  # untrained: uniform
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(given, condition, keep=torch.ones(4).bool())[0].backward()
        optimizer.step()
    assert model.eval().loss(given, condition)[0] < 0.01
    made = generate(model, condition, Sampler(greedy=True), Noise(0, torch.arange(4))).tokens
    assert torch.equal(made, given)


# ---- numbers in other forms


def test_half_precision_leaves_the_angles_whole() -> None:
    whole, half = randomised(torch.float32), randomised(torch.bfloat16)
    assert half.embed.weight.dtype == torch.bfloat16 and half.rotary.dtype == torch.float32
    assert torch.equal(half.rotary, whole.rotary)
    state = generate(half, conditions("class"), Sampler(guidance=Guidance(scale=2.0)), Noise(0, torch.arange(3)))
    assert state.known.all() and int(state.tokens.max()) < 37


def test_packed_weights_give_the_same_tokens() -> None:
    condition, noise = conditions("class"), Noise(0, torch.arange(3))
    sampler = Sampler(Filter(top_k=20), Guidance(scale=2.0))
    whole = generate(randomised(torch.float32), condition, sampler, noise).tokens
    assert torch.equal(generate(pack_linears(randomised(torch.float32)), condition, sampler, noise).tokens, whole)


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spec": TokenSpec(Grid(1, 2, 2), (1, 8, 8), channels=3)}, "discrete tokens on a Grid.*channels=3"),
        ({"spec": CLIP}, "tokens on a Grid, the tokenizer makes.*Sequence.*layout"),
        ({"layout": (2, 3, 4)}, "has 24 tokens, the tokenizer makes 12"),
        ({"num_classes": None}, "num_classes or text_dim"),
        ({"head": Categorical}, "for a Neighbour head; Categorical reads one state"),
        ({"positions": "absolute"}, "'absolute', must be rotary, learned or sincos"),
        ({"spec": CLIP, "layout": (2, 3, 4)}, "head_dim is 8, must be a multiple of 6 for 3 axes"),
    ],
)
def test_what_cannot_be_served_is_refused_at_construction(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Neighboring(**{"spec": SPEC, "dim": 32, "depth": 1, "heads": 4, "num_classes": 6, **settings})


def test_bad_requests_name_the_value_and_the_range() -> None:
    model, noise = randomised(), Noise(0, torch.arange(1))
    with pytest.raises(ValueError, match="class id 6 is out of range: this model knows 0 to 5"):
        model.begin([Condition(label=torch.tensor([6]))], noise)
    state = model.begin([Condition(label=torch.tensor([0]))], noise)
    with pytest.raises(ValueError, match="one whole diagonal a step"):
        model.step(state, ahead=2)
    with pytest.raises(ValueError, match="the next has 1 tokens, got 2"):
        model.commit(state, torch.tensor([[0, 1]]), torch.tensor([[3, 4]]))


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("nar", {"n_layers": 2}, "NAR: argument 'n_layers' is not known; did you mean 'n_layer'"),
        ("nar", {"block_size": 12}, "block_size is 12, must be a square"),
        ("nar", {"model_type": "class_cond"}, "model_type is 'class_cond', must be c2i or t2i"),
        ("nar-video", {"frame_prediction": True}, "frame_prediction is not supported; impose"),
    ],
)
def test_published_configurations_are_checked(family: str, config: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generators.from_published(family, {}, config)
