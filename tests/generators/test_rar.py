"""RAR: what a row of logits depends on, in any order; the cache against teacher forcing; annealing; published files."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import generators
from generators.rar import RAR
from layers.keymap import CheckpointMismatch
from layers.noise import Noise
from layers.spec import Condition, Grid, Pyramid, Sequence, TokenSpec
from sampling.decode import generate
from sampling.filters import Filter
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from training.published import entries

GRID = TokenSpec(Grid(1, 4, 5), decoded=(1, 16, 20), vocab_size=37)
LINE = TokenSpec(Sequence(11), decoded=(1, 16, 16), vocab_size=37)
LAYOUTS = {"grid": GRID, "sequence": LINE, "pyramid": TokenSpec(Pyramid(((1, 1), (2, 2), (3, 3))), (1, 16, 16), 37)}


def randomised(dtype: torch.dtype = torch.float64, **settings: object) -> RAR:
    """A small model in which every parameter is random, norms, gates and zero-initialised read-outs too."""
    torch.manual_seed(0)
    model = RAR(**{"spec": GRID, "dim": 32, "depth": 2, "heads": 4, "num_classes": 6, **settings})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def labels(*values: int) -> Condition:
    return Condition(label=torch.tensor(values))


def tokens(rows: int, length: int = 20, seed: int = 0) -> Tensor:
    return torch.randint(37, (rows, length), generator=torch.Generator().manual_seed(seed))


def permutations(rows: int, length: int = 20, seed: int = 0) -> Tensor:
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)).argsort(-1)


def test_a_row_of_logits_depends_on_the_tokens_before_it_in_its_order_only() -> None:
    model, given, orders, condition = randomised(), tokens(3), permutations(3), labels(0, 5, 2)
    before = model.logits(given, condition, orders)
    for i in (0, 7, 18):
        changed = given.scatter(1, orders[:, i : i + 1], (given.gather(1, orders[:, i : i + 1]) + 1) % 37)
        after = model.logits(changed, condition, orders)
        assert_close(after[:, : i + 1], before[:, : i + 1])
        assert ((after - before).abs().amax(-1) > 1e-6)[:, i + 1 :].all()


def test_the_place_that_is_asked_for_matters_and_the_places_after_it_do_not() -> None:
    """Two orders that agree on what was seen and on what is next have one law; if what is next differs, another."""
    model, given, condition = randomised(), tokens(1), labels(4)
    order = permutations(1)
    for i in (0, 6, 17):
        rest = torch.cat((order[:, : i + 1], order[:, i + 1 :].flip(1)), dim=1)
        other = torch.cat((order[:, :i], order[:, i:].roll(1, 1)), dim=1)
        law, same, different = (model.logits(given, condition, o)[:, i] for o in (order, rest, other))
        assert_close(same, law)
        assert (different - law).abs().max() > 1e-3


def test_an_order_is_a_shuffle_of_the_tokens_and_of_both_tables_of_places() -> None:
    model, given, condition = randomised(), tokens(1), labels(4)
    order = permutations(1)
    found = model.logits(given, condition, order)
    with torch.no_grad():
        model.position[2:] = model.position[2:][order[0]].clone()
        model.target.copy_(model.target[order[0]].clone())
    assert_close(model.logits(given[:, order[0]], condition), found)


def test_no_order_is_raster() -> None:
    model, given, condition = randomised(), tokens(2), labels(1, 3)
    raster = torch.arange(20).expand(2, -1)
    assert torch.equal(model.logits(given, condition), model.logits(given, condition, raster))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoding_with_the_cache_equals_teacher_forcing(layout: str) -> None:
    spec = LAYOUTS[layout]
    model, given, condition = randomised(spec=spec), tokens(3, spec.length), labels(0, 5, 2)
    full = model.logits(given, condition), model.logits(given, condition.null())
    state = model.begin([condition, condition.null()], Noise(0, torch.arange(3)))
    for place in range(spec.length):
        prediction = model.step(state)
        again = model.step(state)  # reveals nothing, says the same
        assert torch.equal(prediction.z, again.z)
        found = prediction.head.logits(prediction.z)[:, :, 0]
        assert_close(found, torch.stack([branch[:, place] for branch in full]))
        assert torch.equal(prediction.positions, torch.full((3, 1), place))
        model.commit(state, prediction.positions, given[:, place : place + 1])
    assert state.known.all() and torch.equal(state.tokens, given) and state.nfe == 2 * spec.length


@pytest.mark.parametrize("rows", [1, 40])  # the modulations of many slots at once; of one
def test_modulations_made_ahead_change_nothing(rows: int) -> None:
    index = torch.arange(rows)
    model, given, condition = randomised(), tokens(rows), Condition(label=index % 6)
    full = model.logits(given, condition, None)
    state = model.begin([condition, condition.null()], Noise(0, index))
    for place in range(20):
        prediction = model.step(state)
        assert_close(prediction.head.logits(prediction.z)[0, :, 0], full[:, place])
        model.commit(state, prediction.positions, given[:, place : place + 1])


def test_score_gives_the_law_of_every_drafted_token_and_of_the_one_after() -> None:
    model, given, condition = randomised(), tokens(3), labels(0, 5, 2)
    full = model.logits(given, condition)
    state = model.begin([condition], Noise(0, torch.arange(3)))
    wrong = tokens(3, seed=9)
    kept = torch.tensor([0, 3, 5])  # accepted drafts differ from row to row: a ragged batch
    prediction = model.score(state, torch.where(torch.arange(5) < kept[:, None], given[:, :5], wrong[:, :5]))
    laws = prediction.head.logits(prediction.z)[0]
    for row, n in enumerate(kept.tolist()):
        assert_close(laws[row, : n + 1], full[row, : n + 1])
    model.commit(state, prediction.positions, given[:, :6], torch.arange(6) <= kept[:, None])
    assert torch.equal(state.length, kept + 1)
    for offset in range(1, 6):  # rejected rows of the cache are written again
        prediction = model.step(state)
        place = kept + offset
        assert torch.equal(prediction.positions[:, 0], place)
        assert_close(prediction.head.logits(prediction.z)[0, :, 0], full[torch.arange(3), place])
        model.commit(state, prediction.positions, given.gather(1, place[:, None]))


def test_a_draft_may_reach_beyond_the_end() -> None:
    model, given, condition = randomised(), tokens(2), labels(0, 5)
    full = model.logits(given, condition)
    state = model.begin([condition], Noise(0, torch.arange(2)))
    for place in range(17):
        model.commit(state, model.step(state).positions, given[:, place : place + 1])
    laws = model.score(state, torch.cat((given[:, 17:], tokens(2, 3)), dim=1))
    assert_close(laws.head.logits(laws.z)[0, :, :3], full[:, 17:])


@pytest.mark.parametrize("to", [[0, 0, 0], [0, 4, 9], [2, 2, 7]])
def test_rewind_forgets_all_but_the_first_tokens(to: list[int]) -> None:
    model, given, condition = randomised(), tokens(3), labels(0, 5, 2)
    full = model.logits(given, condition)
    state = model.begin([condition], Noise(0, torch.arange(3)))
    for place in range(9):
        model.commit(state, model.step(state).positions, given[:, place : place + 1])
    model.rewind(state, torch.tensor(to))
    assert torch.equal(state.length, torch.tensor(to)) and torch.equal(state.known.sum(1), state.length)
    prediction = model.step(state)
    assert_close(prediction.head.logits(prediction.z)[0, :, 0], full[torch.arange(3), torch.tensor(to)])


def test_sampling_stays_the_same_whatever_the_batch_in_float64() -> None:
    model, index = randomised(spec=LINE), torch.arange(48)
    sampler = Sampler(Filter(temperature=1.02), Guidance(6.9, "power_cosine", power=1.5))
    condition = Condition(label=index % 6)
    whole = generate(model, condition, sampler, Noise(3, index)).tokens
    for size in (1, 16):
        for start in range(0, 48, 16):
            rows = slice(start, start + size)
            part = generate(model, condition.select(rows), sampler, Noise(3, index[rows])).tokens
            assert torch.equal(part, whole[rows])


def test_fixed_tokens_are_imposed_and_seen() -> None:
    model, condition, given = randomised(), labels(1, 2), tokens(2)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(2)) < 0.5
    noise = Noise(0, torch.arange(2))
    made = generate(model, condition, Sampler(greedy=True), noise, fixed=(given, mask)).tokens
    assert torch.equal(made[mask], given[mask])
    law = model.logits(made, condition)
    assert torch.equal(made[~mask], law.argmax(-1)[~mask])


def test_a_prefix_is_the_beginning_of_the_whole() -> None:
    model, condition, noise = randomised(), labels(1, 2), Noise(0, torch.arange(2))
    whole = generate(model, condition, Sampler(), noise).tokens
    part = generate(model, condition, Sampler(), noise, length=7)
    assert torch.equal(part.tokens[:, :7], whole[:, :7]) and not part.known[:, 7:].any()


# ---- training


def test_orders_go_from_all_shuffled_to_raster() -> None:
    model = randomised(anneal=(0.5, 0.75))
    shares = [model.curriculum(step, 1000)["shuffled"] for step in range(1000)]
    assert set(shares[:501]) == {1.0} and set(shares[750:]) == {0.0}
    assert_close(torch.tensor(shares[500:751]), torch.linspace(1, 0, 251))
    raster = torch.arange(20)
    torch.manual_seed(0)
    assert torch.equal(model.draw_orders(50, shares[-1]), raster.expand(50, -1))
    drawn = model.draw_orders(4000, shares[0])
    assert torch.equal(drawn.sort(-1).values, raster.expand(4000, -1))
    assert not (drawn == raster).all(-1).any()
    # each token comes at each place with probability 1/20: 400 counts within 5 standard deviations, false in 1 of 4,000
    counts = torch.nn.functional.one_hot(drawn, 20).sum(0)
    assert ((counts - 200).abs() < 5 * (4000 * 0.05 * 0.95) ** 0.5).all()
    share = (model.draw_orders(4000, 0.25) != raster).any(-1).double().mean()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5


@pytest.mark.parametrize(("anneal", "shares"), [((0, 0), (0, 0)), ((1, 1), (1, 1)), ((0.5, 0.5), (1, 0))])
def test_annealing_may_be_left_out_or_sudden(anneal: tuple[float, float], shares: tuple[float, float]) -> None:
    model = randomised(anneal=anneal)
    assert tuple(model.curriculum(step, 10)["shuffled"] for step in (0, 9)) == shares


def test_the_loss_is_the_cross_entropy_of_the_order_that_is_given() -> None:
    model, given, orders, condition = randomised(), tokens(3), permutations(3), labels(0, 5, 2)
    loss, parts = model.loss(given, condition, orders)
    law = model.logits(given, condition, orders).log_softmax(-1)
    assert_close(loss, -law.gather(-1, given.gather(1, orders)[..., None]).mean())
    assert torch.equal(parts["cross_entropy"], loss)
    assert_close(model.loss(given, condition)[0], model.loss(given, condition, torch.arange(20).expand(3, -1))[0])
    null, _ = model.loss(given, condition, orders, keep=torch.zeros(3, dtype=torch.bool))
    assert_close(null, model.loss(given, labels(6, 6, 6), orders)[0])


def test_an_untrained_model_is_uniform_and_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = RAR(GRID, dim=32, depth=1, heads=2, num_classes=3)
    assert_close(model.loss(tokens(2), labels(0, 1))[0], torch.tensor(37.0).log())
    model = randomised()
    model.loss(tokens(2), labels(0, 1), permutations(2))[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_a_small_model_learns_four_pictures_by_heart_in_any_order() -> None:
    torch.manual_seed(0)
    model = RAR(LINE, dim=32, depth=1, heads=4, num_classes=4, dropout=0.0, attention_dropout=0.0, condition_drop=0.0)
    given, condition = tokens(4, 11), labels(0, 1, 2, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(120):
        loss, _ = model.loss(given, condition, **model.curriculum(step, 120))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert loss < 0.05
    made = generate(model, condition, Sampler(greedy=True), Noise(0, torch.arange(4))).tokens
    assert torch.equal(made, given)


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spec": TokenSpec(Sequence(4), (1, 8, 8), channels=3)}, "RAR predicts discrete.*the tokenizer makes cont"),
        ({"num_classes": None}, "give num_classes"),
        ({"heads": 5}, "heads=5 must divide dim=32"),
        ({"anneal": (0.75, 0.5)}, r"anneal is \(0.75, 0.5\)"),
    ],
)
def test_what_cannot_be_served_is_refused_at_construction(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RAR(**{"spec": GRID, "dim": 32, "depth": 1, "heads": 4, "num_classes": 6, **settings})


def test_bad_requests_name_the_value_and_the_range() -> None:
    model, noise = randomised(), Noise(0, torch.arange(1))
    with pytest.raises(ValueError, match="class id 6 is out of range: this model knows 0 to 5"):
        model.begin([labels(6)], noise)
    with pytest.raises(ValueError, match="length is 21, this generator makes 1 to 20"):
        model.begin([labels(0)], noise, length=21)
    with pytest.raises(ValueError, match="ask `score`"):
        model.step(model.begin([labels(0)], noise), ahead=2)


# ---- published files

MILLIONS = {"rar-b": 260.9, "rar-l": 461.7, "rar-xl": 955.4, "rar-xxl": 1498.5}
HIDDEN = {"rar-b": 3072, "rar-l": 4096, "rar-xl": 5120, "rar-xxl": 6144}


def layout(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the original file."""
    sizes, vocab = config["model"]["generator"], config["model"]["vq_model"]["codebook_size"]
    d, f, length = sizes["hidden_size"], sizes["intermediate_size"], sizes["image_seq_len"]
    head = d // sizes["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, length + 1024, d),
        "target_aware_pos_embed": (1, length + 1024, d),
        "timesteps_embeddings": (1, length + 100, d),
        "embeddings.weight": (vocab + sizes["condition_num_classes"] + 2, d),
    }
    linears: dict[str, tuple[int, ...]] = {"adaln_before_head.adaLN_modulation.1": (2 * d, d), "lm_head": (vocab, d)}
    for i in range(sizes["num_hidden_layers"]):
        linears |= {f"blocks.{i}.{name}": (d,) for name in ("norm1", "norm2")}
        linears |= {f"blocks.{i}.attn.{name}": (head,) for name in ("q_norm", "k_norm")}
        linears |= {f"blocks.{i}.attn.qkv": (3 * d, d), f"blocks.{i}.attn.proj": (d, d)}
        linears |= {f"blocks.{i}.mlp.fc1": (f, d), f"blocks.{i}.mlp.fc2": (d, f)}
        linears |= {f"blocks.{i}.adaLN_modulation.1": (6 * d, d)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


@pytest.mark.parametrize("name", MILLIONS)
def test_an_entry_takes_every_key_of_the_original_layout(name: str) -> None:
    entry = entries()[name]
    shapes = layout(entry.config)
    state = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    stored = sum(tensor.numel() for tensor in state.values()) / 1e6
    assert abs(stored - MILLIONS[name]) < 0.05 and abs(stored - entry.parameters) < 1
    model = generators.from_published("rar", state, entry.config)
    d = entry.config["model"]["generator"]["hidden_size"]
    unread = (2 * 1022 + 98 + 2 + 1) * d  # rows of the three tables, and the mask
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in state.values()) - unread
    assert model.spec == TokenSpec(Grid(1, 16, 16), (1, 256, 256), vocab_size=1024)
    assert model.trunk.blocks[-1].mlp.fc1.out_features == HIDDEN[name] and model.anneal == (0.5, 0.75)


def test_every_key_is_needed_and_no_other_is_taken() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"image_seq_len": 6, "condition_num_classes": 5}
    config = {"model": {"generator": sizes, "vq_model": {"codebook_size": 20}}}
    state = {key: torch.zeros(shape) for key, shape in layout(config).items()}
    assert generators.from_published("rar", state, config).spec.layout == Sequence(6)
    for key in state:
        with pytest.raises(CheckpointMismatch, match="not in the checkpoint"):
            generators.from_published("rar", {k: t for k, t in state.items() if k != key}, config)
    with pytest.raises(CheckpointMismatch, match=r"blocks\.0\.norm3"):
        generators.from_published("rar", {**state, "blocks.0.norm3": torch.zeros(2)}, config)


def test_the_recipes_are_those_of_the_published_numbers() -> None:
    found, listed = {}, entries()
    for name in MILLIONS:
        sampler = Sampler.from_values({"greedy": False, **listed[name].recipe})
        found[name] = sampler.filter.temperature, sampler.guidance
        assert sampler.filter == Filter(temperature=sampler.filter.temperature)
        assert listed[name].tokenizer == "maskgit-vqgan"
    assert found == {
        "rar-b": (1.0, Guidance(16.0, "power_cosine", power=2.75)),
        "rar-l": (1.02, Guidance(15.5, "power_cosine", power=2.5)),
        "rar-xl": (1.02, Guidance(6.9, "power_cosine", power=1.5)),
        "rar-xxl": (1.02, Guidance(8.0, "power_cosine", power=1.2)),
    }
