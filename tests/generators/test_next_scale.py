"""Next-scale prediction: who sees whom, the cache against teacher forcing, editing, groups of scales, learning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from generators import next_scale
from generators.next_scale import NextScale
from layers.attention import block_causal_mask
from layers.noise import Noise
from layers.pyramid import ScaleReader
from layers.spec import Condition, Grid, Pyramid, TokenSpec
from layers.windows import neighbourhood_mask
from sampling.decode import generate
from sampling.filters import Filter
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from sampling.smooth import Smooth

SIZES = ((1, 1), (2, 2), (3, 4), (4, 5))
ENDS = (0, 1, 5, 17, 37)
SPEC = TokenSpec(Pyramid(SIZES), decoded=(1, 16, 20), vocab_size=23)
MARKOV = {"attention": "scale", "window": 3, "windowed_from": 2}
KINDS: dict[str, dict[str, Any]] = {
    "var": {},
    "plain": {"cosine": False, "shared_modulation": True},
    "mvar": MARKOV,
}


def reader(sizes: tuple[tuple[int, int], ...] = SIZES, vocab: int = 23) -> ScaleReader:
    torch.manual_seed(1)
    made = ScaleReader(sizes, vocab, channels=6)
    for name, tensor in made.state_dict().items():
        tensor.normal_(std=0.3 if "phi" in name else 1.0)
    return made


def randomised(dtype: torch.dtype = torch.float64, **settings: Any) -> NextScale:
    """A small model in which every parameter is random."""
    given = reader()
    torch.manual_seed(0)
    model = NextScale(
        **{"spec": SPEC, "reader": given, "dim": 24, "depth": 2, "heads": 3, "num_classes": 6, **settings}
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def labels(*values: int) -> Condition:
    return Condition(label=torch.tensor(values))


def tokens(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(23, (rows, 37), generator=torch.Generator().manual_seed(seed))


def dense_mask(kind: str) -> Tensor:
    """Who may see whom, as one mask over all positions."""
    lengths = [h * w for h, w in SIZES]
    if kind != "mvar":
        return block_causal_mask(lengths)
    blocks = [torch.ones(n, n, dtype=torch.bool) for n in lengths[:2]]
    return torch.block_diag(*blocks, *(neighbourhood_mask(*size, 3) for size in SIZES[2:]))


@pytest.mark.parametrize("kind", KINDS)
def test_attending_scale_by_scale_is_attending_under_the_dense_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, condition = randomised(**KINDS[kind]), tokens(2), labels(0, 5)
    found = model.logits(given, condition)
    whole, attend, mask = slice(0, 37), F.scaled_dot_product_attention, dense_mask(kind)
    monkeypatch.setattr(model, "_spans", lambda *_: [next_scale.Span(whole, whole, (1, 37))])
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv, **how: attend(*qkv, attn_mask=mask, **how))
    assert_close(model.logits(given, condition), found)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_teacher_forcing_and_a_step_reveals_nothing(kind: str) -> None:
    model, given, condition = randomised(**KINDS[kind]), tokens(3), labels(0, 5, 2)
    full = model.logits(given, condition), model.logits(given, condition.null())
    state = model.begin([condition, condition.null()], Noise(0, torch.arange(3)))
    assert state.rounds == 4 and (state.caches is None) == (kind == "mvar")
    for scale in range(4):
        prediction = model.step(state)
        again = model.step(state)
        assert torch.equal(prediction.z, again.z)
        rows = slice(ENDS[scale], ENDS[scale + 1])
        assert_close(prediction.head.logits(prediction.z), torch.stack([branch[:, rows] for branch in full]))
        assert torch.equal(prediction.positions, torch.arange(37)[rows].expand(3, -1))
        assert (prediction.index == scale).all() and prediction.total == 4
        model.commit(state, prediction.positions, given[:, rows])
        assert (state.length == rows.stop).all() and torch.equal(state.known.sum(1), state.length)
    assert torch.equal(state.tokens, given) and state.nfe == 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_depends_on_the_scales_before_it_alone(kind: str) -> None:
    model, given, condition = randomised(**KINDS[kind]), tokens(2), labels(0, 5)
    before = model.logits(given, condition)
    for scale, place in enumerate((0, 3, 9, 30)):
        changed = given.clone()
        changed[:, place] = (changed[:, place] + 1) % 23
        moved = (model.logits(changed, condition) - before).abs().amax(-1) > 1e-9
        assert not moved[:, : ENDS[scale + 1]].any() and moved[:, ENDS[scale + 1] :].all()


@pytest.mark.parametrize("kind", ["var", "mvar"])
def test_in_mvar_the_past_comes_in_through_the_features_alone(kind: str) -> None:
    """Noise on the inputs of one scale moves no other scale of MVAR; in VAR it moves the later ones."""
    model, given, condition = randomised(**KINDS[kind]), tokens(2), labels(0, 5)
    before = model.logits(given, condition)
    features = model.reader(given)
    features[:, 2] += 1.0  # a cell of scale 1
    model.reader = torch.nn.Identity()
    model.reader.forward = lambda _: features
    moved = (model.logits(given, condition) - before).abs().amax(-1).amax(0) > 1e-9
    scales = [bool(moved[ENDS[k] : ENDS[k + 1]].any()) for k in range(4)]
    assert scales == ([False, True, False, False] if kind == "mvar" else [False, True, True, True])


@pytest.mark.parametrize("kind", ["var", "mvar"])
def test_sampling_stays_the_same_whatever_the_batch_in_float64(kind: str) -> None:
    model = randomised(**KINDS[kind])
    filters = Filter(top_k=12, top_p=0.9, convention="var")
    sampler, index = Sampler(filters, Guidance(scale=1.5, schedule="ramp", rule="var")), torch.arange(16)
    condition = Condition(label=index % 6)
    whole = generate(model, condition, sampler, Noise(3, index)).tokens
    for rows in (slice(0, 1), slice(3, 4), slice(4, 12)):
        part = generate(model, condition.select(rows), sampler, Noise(3, index[rows])).tokens
        assert torch.equal(part, whole[rows])
    assert len(whole.unique()) > 10


def test_guidance_ramps_from_the_condition_alone_to_its_full_scale() -> None:
    model, condition, given = randomised(), labels(0, 5), tokens(2)
    sampler = Sampler(guidance=Guidance(scale=1.5, schedule="ramp", rule="var"), greedy=True)
    made = generate(model, condition, sampler, Noise(0, torch.arange(2))).tokens
    for scale in range(4):
        t = 1.5 * scale / 3
        rows = slice(ENDS[scale], ENDS[scale + 1])
        mixed = (1 + t) * model.logits(made, condition) - t * model.logits(made, condition.null())
        assert torch.equal(mixed[:, rows].argmax(-1), made[:, rows])
    assert not torch.equal(made, given)


def test_given_tokens_are_imposed_and_fed_on() -> None:
    model, condition, given = randomised(), labels(1, 2), tokens(2)
    mask = torch.rand(2, 37, generator=torch.Generator().manual_seed(2)) < 0.5
    noise = Noise(0, torch.arange(2))
    state = generate(model, condition, Sampler(), noise, fixed=(given, mask))
    assert torch.equal(state.tokens[mask], given[mask])
    assert not torch.equal(state.tokens, generate(model, condition, Sampler(), noise).tokens)
    *_, expected = model.reader.scales.sums(model.reader.embed(state.tokens))
    assert_close(state.memory, expected)


def test_a_prefix_of_scales_is_the_beginning_of_the_whole() -> None:
    model, condition, noise = randomised(), labels(1, 2), Noise(0, torch.arange(2))
    whole, seen = generate(model, condition, Sampler(), noise).tokens, []
    part = generate(model, condition, Sampler(), noise, length=17, preview=lambda state: seen.append(state.round))
    assert torch.equal(part.tokens[:, :17], whole[:, :17]) and not part.known[:, 17:].any() and seen == [1, 2, 3]


def test_scales_have_their_own_temperature_and_guidance() -> None:
    model, condition, noise = randomised(), labels(1, 2), Noise(0, torch.arange(2))
    cold = Sampler(temperatures=(1.0, 1.0, 1e-9, 1e-9))
    made = generate(model, condition, cold, noise).tokens
    warm = generate(model, condition, Sampler(), noise).tokens
    assert torch.equal(made[:, :5], warm[:, :5]) and not torch.equal(made, warm)
    assert torch.equal(model.logits(made, condition)[:, 5:].argmax(-1), made[:, 5:])
    ramp = Guidance(scale=2.0, schedule="ramp", rule="var")
    listed = Guidance(schedule="listed", values=(0.0, 2 / 3, 4 / 3, 2.0), rule="var")
    one, two = (generate(model, condition, Sampler(guidance=each), noise).tokens for each in (ramp, listed))
    assert torch.equal(one, two)
    for sampler in (Sampler(temperatures=(1.0,)), Sampler(guidance=Guidance(schedule="listed", values=(2.0, 3.0)))):
        with pytest.raises(ValueError, match="entries, this decoding has 4 steps"):
            generate(model, condition, sampler, noise)


def test_smooth_sampling_feeds_on_a_mean_of_codes_that_sharpens_to_the_drawn_one() -> None:
    model, condition, noise = randomised(), labels(1, 2), Noise(0, torch.arange(2))
    state = generate(model, condition, Sampler(smooth=Smooth()), noise)
    *_, of_tokens = model.reader.scales.sums(model.reader.embed(state.tokens))
    assert (state.memory - of_tokens).abs().max() > 1e-3
    hard = generate(model, condition, Sampler(Filter(top_k=1), smooth=Smooth()), noise)  # one code is left to mix
    *_, of_tokens = model.reader.scales.sums(model.reader.embed(hard.tokens))
    assert_close(hard.memory, of_tokens)


# ---- training


def test_the_loss_is_the_mean_over_all_positions() -> None:
    model, given, condition = randomised(), tokens(3), labels(0, 1, 2)
    loss, parts = model.loss(given, condition)
    assert_close(loss, F.cross_entropy(model.logits(given, condition).movedim(-1, 1), given))
    assert_close(parts["cross_entropy"], loss.detach())
    null, _ = model.loss(given, condition, keep=torch.zeros(3, dtype=torch.bool))
    assert_close(null, model.loss(given, condition.null())[0])
    model.condition_drop = 1.0
    assert_close(model.train().loss(given, condition)[0], null)


def test_groups_of_scales_trained_apart_add_up_to_the_whole() -> None:
    model, given, condition = randomised(**MARKOV, coarse_steps=3), tokens(3), labels(0, 1, 2)
    groups = [model.curriculum(step, 10)["scales"] for step in range(10)]
    assert groups == [(0, 2), (0, 2), (0, 2), (2, 3), (3, 4)] * 2
    whole, _ = model.loss(given, condition)
    assert_close(sum(model.loss(given, condition, scales=group)[0] for group in set(groups)), whole)
    model.loss(given, condition, scales=(2, 3))[0].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # what processes exchange is the same
    assert model.start.grad.abs().sum() == 0 and model.position.grad[5:17].abs().sum() > 0


def test_a_growing_pyramid_trains_its_first_scales_and_warms_up_the_newest() -> None:
    growing = {"progressive": 0.5, "first_scales": 2, "hold": 10, "scale_warmup": 4}
    model, given, condition = randomised(**growing), tokens(3), labels(0, 1, 2)
    stages = [model.curriculum(step, 100) for step in range(100)]
    assert stages[10] == {"scales": (0, 2), "warm": 1.0} and stages[50:] == [{}] * 50
    third = [stage for stage in stages if stage.get("scales") == (0, 3)]
    assert [stage["warm"] for stage in third[:5]] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert len(third) == 20 - 1  # from a quarter to three quarters of the growth, ties to even
    first, both = (model.loss(given, condition, scales=(0, stop))[0] for stop in (2, 3))
    half, _ = model.loss(given, condition, scales=(0, 3), warm=0.5)
    assert_close(half, first + (both - first) / 2)


@pytest.mark.parametrize("kind", ["var", "mvar"])
def test_a_handful_of_pictures_is_learnt_by_heart(kind: str) -> None:
    torch.manual_seed(0)
    model = NextScale(
        SPEC, reader(), dim=32, depth=2, heads=2, num_classes=4, condition_drop=0.0, **KINDS[kind]
    ).train()
    given, condition = tokens(4), labels(0, 1, 2, 3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(120):
        loss, _ = model.loss(given, condition)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    sampler = Sampler(greedy=True)
    made = generate(model.eval(), condition, sampler, Noise(0, torch.arange(4))).tokens
    assert (made == given).float().mean() > 0.98


def test_the_initial_weights_are_the_published_rule() -> None:
    torch.manual_seed(0)
    model = NextScale(SPEC, reader(), dim=96, depth=8, heads=3, num_classes=4, gate_init=1e-3)
    std = (3 * 96) ** -0.5
    block = model.trunk.blocks[3]
    gates, others = block.modulation.project.weight.detach().view(6, 96, 96).tensor_split([2])
    expected = {
        model.word.weight: 1.0,
        model.position: 1.0,
        block.attention.qkv.weight: 1.0,
        block.attention.out.weight: 0.25,
        block.mlp.fc2.weight: 0.25,
        gates: 1e-3,
        others: 0.5,
        model.norm_modulation.project.weight: 0.5,
        model.head.readout.weight: 0.02,
    }
    for tensor, factor in expected.items():
        assert tensor.std().item() == pytest.approx(std * factor, rel=0.1)
    assert (block.attention.q_bias == 0).all() and (block.mlp.fc1.bias == 0).all()
    assert_close(block.attention.log_scale.exp(), torch.full((3, 1), 4.0))


# ---- precision, compilation, refusals


def test_half_precision_leaves_codes_and_read_out_whole() -> None:
    model = randomised(torch.float32)
    codes, order = model.reader.codebook.clone(), [name for name, _ in model.named_parameters()]
    model.to(torch.bfloat16)
    assert model.word.weight.dtype == torch.bfloat16
    assert torch.equal(model.reader.codebook, codes) and model.head.readout.weight.dtype == torch.float32
    assert [name for name, _ in model.named_parameters()] == order
    state = generate(model, labels(1, 2), Sampler(guidance=Guidance(scale=2.0)), Noise(0, torch.arange(2)))
    assert state.known.all() and state.memory.dtype == torch.float32


def test_every_scale_is_compiled_for() -> None:
    """With the tracing half of torch.compile alone, and its own limit on shapes set below the number of scales."""
    sizes = ((1, 1), (1, 2), (1, 3))
    spec = TokenSpec(Pyramid(sizes), decoded=(1, 8, 8), vocab_size=23)
    model, condition, noise = randomised(spec=spec, reader=reader(sizes), depth=1), labels(1), Noise(0, torch.arange(1))
    eager = generate(model, condition, Sampler(), noise).tokens
    graphs = []
    model.trunk.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        assert torch.equal(generate(model, condition, Sampler(), noise).tokens, eager)
    assert len(graphs) == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spec": TokenSpec(Grid(1, 4, 4), (1, 8, 8), vocab_size=23)}, r"in a Pyramid, the tokenizer makes .*Grid"),
        ({"spec": TokenSpec(Pyramid(SIZES), (1, 8, 8), channels=3)}, "discrete tokens.*channels=3"),
        ({"reader": reader(vocab=24)}, r"24 codes at the sizes .* the tokens are of 23 codes"),
        (
            {"reader": reader(SIZES[:1] + SIZES[2:])},
            r"sizes \(\(1, 1\), \(3, 4\).*tokens are of 23 codes at \(\(1, 1\), \(2, 2\)",
        ),
        ({"num_classes": None}, "give num_classes"),
        ({"heads": 5}, "heads=5 must divide dim=24"),
        ({"window": 3}, 'window=3 .* need attention="scale"'),
        ({**MARKOV, "window": 5}, r"window is 5: must be odd, and no larger than the grid of 3 x 4 cells"),
        ({"progressive": 0.5, "first_scales": 9}, r"first_scales=9 in \[1, 4\]"),
    ],
)
def test_what_cannot_be_served_is_refused_at_construction(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        randomised(**settings)


REQUESTS: list[tuple[Callable[[NextScale, Noise], object], str]] = [
    (lambda model, noise: model.begin([labels(6)], noise), "class id 6 is out of range: this model knows 0 to 5"),
    (lambda model, noise: model.begin([labels(0)], noise, length=6), "length is 6, whole scales end at 1, 5, 17, 37"),
    (lambda model, noise: model.step(model.begin([labels(0)], noise), ahead=2), "one whole scale a step"),
    (lambda model, _: model.loss(tokens(1), labels(0), scales=(1, 2)), "must begin at 0"),
    (
        lambda model, noise: model.commit(model.begin([labels(0)], noise), torch.zeros(1, 2).long(), tokens(1)[:, :2]),
        "the next has 1 tokens, got 2",
    ),
]


@pytest.mark.parametrize(("ask", "words"), REQUESTS)
def test_bad_requests_are_refused_with_what_would_do(ask: Callable[[NextScale, Noise], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ask(randomised(), Noise(0, torch.arange(1)))
