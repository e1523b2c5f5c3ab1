"""Next-X prediction: how entities cut a grid, who sees whom, the cache against teacher forcing, editing, learning."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from generators import from_published
from generators.next_entity import (
    XAR,
    CellEntity,
    Entity,
    ImageEntity,
    ScaleEntity,
    SubsampleEntity,
    TokenEntity,
)
from heads.flow import FieldHead, FlowHead
from layers.keymap import CheckpointMismatch
from layers.noise import Noise
from layers.packed import pack_linears
from layers.record import build
from layers.spec import Condition, Grid, Pyramid, TokenSpec
from sampling.decode import generate
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from training.published import entries
from training.run import CLASSES

H, W, L, C = 4, 6, 24, 3
SPEC = TokenSpec(Grid(1, H, W), decoded=(1, 16, 24), channels=C)
ENTITIES: dict[str, Entity] = {
    "token": TokenEntity(),
    "cell": CellEntity(2),
    "oblong": CellEntity([4, 2]),
    "subsample": SubsampleEntity(2),
    "scale": ScaleEntity(3),
    "image": ImageEntity(),
}
GUIDED = Sampler(guidance=Guidance(schedule="linspace", end=2.5))
STEPS = partial(FieldHead, steps=3)


def randomised(kind: str = "cell", dtype: torch.dtype = torch.float64, **settings: Any) -> XAR:
    """A small model in which every parameter is random."""
    torch.manual_seed(0)
    given = {"spec": SPEC, "entity": ENTITIES[kind], "dim": 16, "depth": [2, 1], "heads": [2, 4], "num_classes": 6}
    model = XAR(**{**given, "head": STEPS, **settings})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def labels(*values: int) -> Condition:
    return Condition(label=torch.tensor(values))


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_of(*samples: int) -> Noise:
    return Noise(0, torch.tensor(samples))


# ---- entities


def test_the_entities_of_a_small_grid_written_by_hand() -> None:
    expected = {
        "token": [[place] for place in range(24)],
        "cell": [
            [0, 1, 6, 7],
            [2, 3, 8, 9],
            [4, 5, 10, 11],
            [12, 13, 18, 19],
            [14, 15, 20, 21],
            [16, 17, 22, 23],
        ],
        "oblong": [[row * 6 + 2 * cell + column for row in range(4) for column in (0, 1)] for cell in range(3)],
        "subsample": [
            [0, 3, 12, 15],
            [1, 4, 13, 16],
            [2, 5, 14, 17],
            [6, 9, 18, 21],
            [7, 10, 19, 22],
            [8, 11, 20, 23],
        ],
        "scale": [[24, 25], list(range(26, 32)), list(range(24))],  # of 1 x 2, 2 x 3 and 4 x 6 tokens
        "image": [list(range(24))],
    }
    assert {kind: [each.tolist() for each in entity.split(H, W)] for kind, entity in ENTITIES.items()} == expected


@pytest.mark.parametrize(("h", "w"), [(4, 6), (8, 8), (16, 4)])
@pytest.mark.parametrize("kind", ENTITIES)
def test_every_token_of_the_grid_belongs_to_one_entity(kind: str, h: int, w: int) -> None:
    places = torch.cat(tuple(ENTITIES[kind].split(h, w)))
    extra = sum(a * b for a, b in ENTITIES[kind].coarse(h, w))
    assert torch.equal(places.sort().values, torch.arange(h * w + extra)) and (extra > 0) == (kind == "scale")


def test_coarse_tokens_are_means_and_stand_in_the_middle_of_what_they_cover() -> None:
    model, given = randomised("scale"), normal(2, L, C)
    grid = given.view(2, H, W, C)
    middle = grid.view(2, 2, 2, 3, 2, C).mean((2, 4)).flatten(1, 2)
    assert_close(model.whole(given)[:, 26:], middle)
    assert_close(model.whole(given)[:, 24], grid[:, :, :3].mean((1, 2)))
    angle = torch.atan2(
        *model.trunk.first.rotary[2].unbind(-1)[::-1]
    )  # of the first of 2 x 3, that covers 2 x 2 tokens
    assert_close(angle, torch.tensor([0.5, 0.005, 0.5, 0.005]))


def test_an_entity_is_one_line_of_a_configuration() -> None:
    for name, arguments in {"CellEntity": {"size": 2}, "ScaleEntity": {"scales": 2}, "ImageEntity": {}}.items():
        record = {"class_path": name, "init_args": arguments}
        init = {"entity": record, "dim": 16, "depth": 1, "heads": 2, "num_classes": 6}
        model = build({"class_path": "XAR", "init_args": init}, CLASSES, spec=SPEC)
        assert model.order.tolist() == torch.cat(tuple(CLASSES[name](**arguments).split(H, W))).tolist()


# ---- who sees whom


@pytest.mark.parametrize("kind", ENTITIES)
def test_a_velocity_depends_on_its_entity_and_the_earlier_ones_alone(kind: str) -> None:
    model, condition = randomised(kind), labels(0, 5)
    x, t = normal(2, len(model.order), C), torch.rand(2, len(model.lengths), generator=torch.Generator().manual_seed(1))
    before = model.velocity(x, t, condition)[:, model.order]
    for entity in range(len(model.lengths)):
        changed, later = x.clone(), t.clone()
        changed[:, model.order[model.ends[entity]]] += 1.0
        later[:, entity] = (later[:, entity] + 0.4) % 1
        for moved in (model.velocity(changed, t, condition), model.velocity(x, later, condition)):
            off = (moved[:, model.order] - before).abs().amax(-1) > 1e-13
            assert not off[:, : model.ends[entity]].any() and off[:, model.ends[entity] :].all()


@pytest.mark.parametrize("kind", ENTITIES)
def test_the_cache_holds_what_teacher_forcing_sees_and_a_step_reveals_nothing(kind: str) -> None:
    """Entities committed one by one are those of one pass under the mask, clean at time 0."""
    model, condition = randomised(kind), labels(0, 5, 2)
    data, x, time = model.whole(normal(3, L, C)), normal(3, len(model.order), C, seed=1), torch.tensor([0.1, 0.7, 0.9])
    state = model.begin([condition, condition.null()], noise_of(0, 1, 2))
    rounds = len(model.lengths)
    assert state.rounds == rounds
    for entity in range(rounds):
        places = model.order[model.ends[entity] : model.ends[entity + 1]]
        mixed, t = data.clone(), torch.zeros(3, rounds)
        mixed[:, places], t[:, entity] = x[:, places], time
        full = torch.stack([model.velocity(mixed, t, each)[:, places] for each in (condition, condition.null())])
        prediction = model.step(state)
        assert_close(prediction.z(x[:, places], time), full)
        prediction.z(x[:, places] + 1.0, torch.ones(()))
        assert_close(model.step(state).z(x[:, places], time), full)
        assert torch.equal(prediction.positions, places.expand(3, -1))
        assert (prediction.index == entity).all() and prediction.total == rounds and prediction.keep == len(places)
        model.commit(state, prediction.positions, data[:, places])
        assert torch.equal(state.length, state.known.sum(1))
    assert torch.equal(state.tokens, data[:, :L]) and state.known.all() and state.nfe == 4 * rounds - 1


def test_time_is_told_in_thousandths_of_a_float32_product() -> None:
    """0.7 is 0.69999999 in float64 times 1000, and 700 in float32; what lies within a thousandth is the same."""
    model, x, condition = randomised("image"), normal(1, L, C), labels(0)
    at = [model.velocity(x, torch.tensor([[t]], dtype=torch.float64), condition) for t in (0.7, 0.7005, 0.6999)]
    assert torch.equal(at[0], at[1]) and not torch.equal(at[0], at[2])


# ---- decoding


@pytest.mark.parametrize("kind", ENTITIES)
def test_samples_do_not_depend_on_the_batch(kind: str) -> None:
    model = randomised(kind)
    whole = generate(model, labels(0, 5, 2), GUIDED, noise_of(4, 5, 6))
    assert whole.tokens.isfinite().all() and whole.known.all()
    apart = [generate(model, labels(y), GUIDED, noise_of(4 + i)).tokens for i, y in enumerate((0, 5, 2))]
    assert_close(torch.cat(apart), whole.tokens, atol=1e-9, rtol=0)


def test_decoding_is_the_solver_on_teacher_forced_velocities() -> None:
    """With equal steps, from the model's own noise, every entity in turn; guidance rises from 1 to its end."""
    model, condition = randomised(head=partial(FieldHead, solver="euler", steps=4, last=None)), labels(3, 1)
    made, noise = torch.zeros(2, L, C, dtype=torch.float64), noise_of(0, 1)
    for entity, places in enumerate(model.order.view(6, 4)):
        scale = 1 + 1.5 * entity / 5
        x = noise.normal("head", places.expand(2, -1), 0, (C,))
        for step in range(4):
            t = torch.zeros(2, 6)
            t[:, entity] = 1 - step / 4
            made[:, places] = x
            c, u = (model.velocity(made, t, each)[:, places] for each in (condition, condition.null()))
            x = x - (u + scale * (c - u)) / 4
        made[:, places] = x
    assert_close(generate(model, condition, GUIDED, noise).tokens, made)


def test_coarse_tokens_have_noise_of_their_own() -> None:
    asked: list[Tensor] = []

    class Listening(Noise):
        def normal(self, use: str, place: Tensor, *more: Any) -> Tensor:
            asked.append(place[0])
            return super().normal(use, place, *more)

    generate(randomised("scale"), labels(1), Sampler(), Listening(0, torch.arange(1)))
    assert torch.equal(torch.cat(asked[::3]).sort().values, torch.arange(32))


@pytest.mark.parametrize("kind", ENTITIES)
def test_given_tokens_are_imposed_and_fed_on(kind: str) -> None:
    model, condition, given, noise = randomised(kind), labels(1, 2), normal(2, L, C), noise_of(0, 1)
    mask = torch.zeros(2, H, W, dtype=torch.bool)
    mask[:, :2, :3] = True  # of the coarse grids, the first of 2 x 3 tokens is covered, and half of the second
    state = generate(model, condition, GUIDED, noise, fixed=(given, mask.flatten(1)))
    free = generate(model, condition, GUIDED, noise).tokens
    assert torch.equal(state.tokens[mask.flatten(1)], given[mask.flatten(1)])
    changed = (state.tokens - free).abs().amax(-1) > 1e-9
    assert changed[:, -1].all() or kind == "image"  # of one entity nothing is fed on
    if kind == "scale":
        assert state.fixed[1][:, L:].nonzero()[:, 1].tolist() == [2, 2]
        assert_close(state.fixed[0][:, 26], given[:, [0, 1, 6, 7]].mean(1))


def test_a_prefix_of_entities_is_the_beginning_of_the_whole() -> None:
    model, condition, noise = randomised(), labels(1, 2), noise_of(0, 1)
    whole, seen = generate(model, condition, GUIDED, noise).tokens, []
    part = generate(model, condition, GUIDED, noise, length=8, preview=lambda state: seen.append(state.round))
    assert seen == [1, 2] and torch.equal(part.known[0].nonzero().flatten(), model.order[:8].sort().values)
    assert_close(part.tokens[part.known], whole[part.known])


# ---- training


@pytest.mark.parametrize("kind", ENTITIES)
def test_the_loss_is_the_mean_squared_error_of_the_velocity(kind: str) -> None:
    model = randomised(kind, dropout=0.0, attention_dropout=0.0, condition_drop=1.0)
    given, condition, noise = normal(3, L, C), labels(0, 1, 2), normal(3, len(model.order), C, seed=1)
    t = torch.rand(3, len(model.lengths), generator=torch.Generator().manual_seed(2))
    data, each = model.whole(given), t.new_empty(3, len(model.order), 1)
    each[:, model.order] = t[:, model.entity_of, None]
    found = model.velocity((1 - each) * data + each * noise, t, condition)
    loss, parts = model.loss(given, condition, t=t, noise=noise)
    assert_close(loss, (found - (noise - data)).square().mean())
    assert_close(parts["velocity_error"], loss)
    null, _ = model.loss(given, condition, keep=torch.zeros(3, dtype=torch.bool), t=t, noise=noise)
    assert_close(null, model.loss(given, condition.null(), t=t, noise=noise)[0])
    assert_close(model.train().loss(given, condition, t=t, noise=noise)[0], null)


@pytest.mark.parametrize("kind", ["cell", "scale"])
def test_a_handful_of_pictures_is_learnt_by_heart(kind: str) -> None:
    torch.manual_seed(0)
    head = partial(FieldHead, solver="euler", steps=20, last=None)
    settings = {"dim": 32, "depth": 1, "heads": 2, "num_classes": 4, "head": head}
    model = XAR(SPEC, ENTITIES[kind], dropout=0.0, attention_dropout=0.0, condition_drop=0.0, **settings).train()
    given, condition = normal(4, L, C).float(), labels(0, 1, 2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(100):
        many = Condition(label=condition.label.repeat(4))
        loss, _ = model.loss(given.repeat(4, 1, 1), many)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.4 * sum(losses[:20])
    made = generate(model.eval(), condition, Sampler(), noise_of(0, 1, 2, 3)).tokens
    nearest = torch.cdist(made.flatten(1), given.flatten(1)).argmin(1)
    assert torch.equal(nearest, condition.label)


def test_the_initial_weights_are_the_published_rule() -> None:
    torch.manual_seed(0)
    model = XAR(SPEC, ENTITIES["cell"], dim=192, depth=1, heads=3, num_classes=1000)
    block = model.trunk.first.blocks[0]
    for layer in (block.modulation.project, block.attention.qkv, block.mlp.fc2, model.trunk.embed, model.readout):
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert layer.weight.abs().max() <= bound and layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert (layer.bias == 0).all()
    for table in (model.condition.table.weight, model.trunk.first.position, model.trunk.second.position):
        assert table.std().item() == pytest.approx(0.02, rel=0.1)


# ---- precision, packed weights, refusals


def test_packed_and_half_precision_models_decode() -> None:
    condition, noise = labels(1, 2), noise_of(0, 1)
    plain, packed = (
        generate(make(randomised(dtype=torch.float32)), condition, GUIDED, noise)
        for make in (pack_linears, lambda m: m)
    )
    assert_close(packed.tokens, plain.tokens, atol=1e-4, rtol=1e-4)
    model = randomised(dtype=torch.bfloat16)
    assert model.trunk.first.rotary.dtype == torch.float32
    assert generate(model, condition, GUIDED, noise).tokens.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spec": TokenSpec(Grid(1, H, W), (1, 8, 8), vocab_size=9)}, "XAR predicts continuous tokens, .*vocab_size=9"),
        ({"spec": TokenSpec(Pyramid(((2, 2),)), (1, 8, 8), channels=3)}, "XAR cuts the grid .* makes .*Pyramid"),
        ({"spec": TokenSpec(Grid(2, H, W), (2, 8, 8), channels=3)}, "XAR cuts the grid of one picture .*Grid.t=2"),
        ({"entity": CellEntity(4)}, "CellEntity: 4x4 tokens do not divide a grid of 4x6 tokens"),
        ({"entity": SubsampleEntity([2, 4])}, "SubsampleEntity: 2x4 tokens do not divide a grid of 4x6 tokens"),
        ({"entity": ScaleEntity(4)}, "a grid of 4x6 tokens cannot be halved to scales=4"),
        ({"head": FlowHead}, "XAR .* needs a FieldHead to integrate it, not FlowHead"),
        ({"num_classes": None}, "give num_classes"),
        ({"heads": 3}, r"dim=16 must be a multiple of 4 x heads=3"),
    ],
)
def test_what_cannot_be_served_is_refused_at_construction(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        randomised(**settings)


REQUESTS: list[tuple[Callable[[XAR, Noise], object], str]] = [
    (lambda model, noise: model.begin([labels(6)], noise), "class id 6 is out of range: this model knows 0 to 5"),
    (lambda model, noise: model.begin([labels(0)], noise, length=6), "length is 6, whole entities end at 4, 8, 12, 16"),
    (lambda model, noise: model.step(model.begin([labels(0)], noise), ahead=2), "one whole entity a step"),
    (
        lambda model, noise: model.commit(model.begin([labels(0)], noise), model.order[None, :2], normal(1, 2, C)),
        "the next has 4 tokens, got 2",
    ),
    (
        lambda model, noise: model.step(generate(model, labels(0), Sampler(), noise)),
        "all 6 entities are committed",
    ),
]


@pytest.mark.parametrize(("ask", "words"), REQUESTS)
def test_bad_requests_are_refused_with_what_would_do(ask: Callable[[XAR, Noise], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ask(randomised(), noise_of(0))


# ---- the published sizes


def original_layout(config: dict[str, Any], device: str) -> dict[str, Tensor]:
    """Zeros without memory under the original keys and shapes, as the published files hold them."""
    dim, hidden = config["encoder_embed_dim"], int(config["encoder_embed_dim"] * 8 / 3)
    shapes: dict[str, tuple[int, ...]] = {"class_emb.weight": (1001, dim), "z_proj_ln.weight": (dim,)}
    layers = {"time_embed.mlp.0": (dim, 256), "time_embed.mlp.2": (dim, dim), "z_proj": (dim, 16), "pred": (16, dim)}
    layers["decoder_embed"] = (dim, dim)
    for stack in ("encoder", "decoder"):
        head_dim = dim // config[f"{stack}_num_heads"]
        shapes |= {f"{stack}_pos_embed_learned": (1, 256, dim), f"{stack}_norm.weight": (dim,)}
        for i in range(config[f"{stack}_depth"]):
            block = f"{stack}_blocks.{i}"
            layers |= {f"{block}.attn.qkv": (3 * dim, dim), f"{block}.attn.proj": (dim, dim)}
            layers |= {f"{block}.mlp.fc1_{part}": (hidden, dim) for part in "gx"}
            layers |= {f"{block}.mlp.fc2": (dim, hidden), f"{block}.ada_lin.1": (6 * dim, dim)}
            rope = {"freqs": (head_dim // 4,), "freqs_cos": (256, head_dim), "freqs_sin": (256, head_dim)}
            shapes |= {f"{block}.attn.rope.{name}": shape for name, shape in rope.items()}
    shapes["mask"] = (1, 1, 256, 256)
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: torch.zeros((), device=device).expand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("name", "scale", "steps"), [("xar-b", 2.7, 40), ("xar-l", 2.3, 50), ("xar-h", 2.2, 50)])
def test_published_checkpoints_have_the_published_size_and_recipe(name: str, scale: float, steps: int) -> None:
    entry = entries()[name]
    model = from_published(entry.family, original_layout(entry.config, "meta"), entry.config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(entry.parameters, abs=0.005)
    assert model.lengths == (64,) * 4 and len(model.head.path.times) == steps + 1
    assert entries()[entry.tokenizer].config["embed_dim"] == model.spec.channels
    guidance = Guidance(**entry.recipe["guidance"])
    assert guidance.branches == 2
    assert_close(guidance.scales(4), 1 + (scale - 1) * torch.arange(4, dtype=torch.float64) / 3)


def test_every_key_is_needed_and_none_may_be_left_over() -> None:
    sizes = {"embed_dim": 8, "depth": 1, "num_heads": 2}
    config = {f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in sizes.items()}
    layout = original_layout(config, "meta")
    for name in layout:
        less = {key: tensor for key, tensor in layout.items() if key != name}
        if "rope" in name or name == "mask":
            from_published("xar", less, config)
        else:
            with pytest.raises(CheckpointMismatch):
                from_published("xar", less, config)
    with pytest.raises(CheckpointMismatch, match=r"pred\.scale"):
        from_published("xar", {**layout, "pred.scale": layout["pred.bias"]}, config)
    with pytest.raises(ValueError, match="encoder_embed_dim is 8, decoder_embed_dim 16"):
        from_published("xar", layout, {**config, "decoder_embed_dim": 16})


def test_the_base_model_samples_at_its_published_size() -> None:
    config = {**entries()["xar-b"].config, "num_steps": 2}
    model = from_published("xar", original_layout(config, "cpu"), config)
    made = generate(model, labels(207), Sampler(), noise_of(0), length=64)
    assert made.known.sum() == 64 and made.tokens.isfinite().all() and made.tokens[made.known].std() > 0.1
