"""MAR: what a known set says, orders, rounds, in-painting, rewinding, batches, masking law, training, published size."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from generators import from_published
from generators.mar import MAR, MAR_KEYS, MARState, masked_share, unmasking
from heads.diffusion import DiffusionHead
from heads.flow import FieldHead, FlowHead
from heads.fourier import FourierDensity
from heads.mixture import MixtureHead
from heads.protocol import Head
from layers.condition import LabelError
from layers.noise import Noise
from layers.spec import Condition, Grid, TokenSpec
from sampling.decode import generate, impose
from sampling.filters import Filter
from sampling.guidance import Guidance, mar_linear
from sampling.sampler import Sampler
from training.published import entries

SPEC = TokenSpec(Grid(1, 4, 4), decoded=(1, 8, 8), channels=3)
HEADS = {
    "diffusion": partial(DiffusionHead, hidden=16, depth=1, steps="ddim5"),
    "flow": partial(FlowHead, hidden=16, depth=1, steps=4),
    "mixture": partial(MixtureHead, components=3),
    "fourier": partial(FourierDensity, frequencies=4, bound=8.0),
}
SAMPLER = Sampler(Filter(temperature=0.9), Guidance(scale=2.0, schedule="mar_linear", length=16))
LABELS = Condition(label=torch.tensor([1, 0, 3, 2]))


def made(seed: int = 0, head: str = "diffusion", **changes: Any) -> MAR:
    """In float64 and eval mode, every parameter random."""
    torch.manual_seed(seed)
    settings = {"dim": 16, "depth": 2, "heads": 2, "num_classes": 5, "buffer": 3, "rounds": 6, **changes}
    model = MAR(SPEC, head=HEADS[head], **settings).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def noise(rows: int = 4, seed: int = 3) -> Noise:
    return Noise(seed, torch.arange(rows))


def pictures(rows: int = 4) -> Tensor:
    return torch.randn(rows, 16, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def advance(model: MAR, state: MARState, rounds: int, random: Noise) -> None:
    for _ in range(rounds):
        prediction = model.step(state)
        draw = SAMPLER.draw(prediction, random, state.round)
        tokens = impose(state.fixed, prediction.positions, prediction.head.sample(prediction.z, draw))
        model.commit(state, prediction.positions, tokens)


# ---- one step


@pytest.mark.parametrize("done", [0, 1, 4])
def test_a_step_says_what_teacher_forcing_says_of_the_known_set(done: int) -> None:
    model, branches = made(decoder_dim=24, decoder_depth=1, decoder_heads=3), (LABELS, LABELS.null())
    state = model.begin(branches, noise())
    advance(model, state, done, noise())
    prediction = model.step(state)
    for z, condition in zip(prediction.z, branches, strict=True):
        hidden = model.hidden(state.tokens, ~state.known, condition)
        assert_close(z, hidden.gather(1, prediction.positions[..., None].expand_as(z)), rtol=0, atol=1e-12)


def test_a_step_reveals_nothing_and_says_the_same_again() -> None:
    model = made()
    state = model.begin([LABELS], noise())
    advance(model, state, 2, noise())
    before = state.tokens.clone(), state.known.clone(), state.length.clone(), state.round
    first, second = model.step(state), model.step(state)
    assert torch.equal(first.z, second.z) and torch.equal(first.positions, second.positions)
    assert all(torch.equal(x, y) for x, y in zip(before[:3], (state.tokens, state.known, state.length), strict=True))
    assert state.round == before[3] and state.nfe == 4


def test_hidden_tokens_are_not_read() -> None:
    model, tokens = made(), pictures()
    mask = torch.rand(4, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    other = torch.where(mask[..., None], 100 * tokens + 1, tokens)
    assert len(set(mask.sum(1).tolist())) > 1  # rows of different counts
    whole = model.hidden(tokens, mask, LABELS)
    assert torch.equal(whole, model.hidden(other, mask, LABELS))
    for row in range(4):
        alone = model.hidden(tokens[row : row + 1], mask[row : row + 1], LABELS.select(slice(row, row + 1)))
        assert_close(whole[row : row + 1], alone, rtol=0, atol=1e-12)


def test_more_positions_ahead_leave_the_first_as_they_were() -> None:
    model = made()
    state = model.begin([LABELS, LABELS.null()], noise())
    advance(model, state, 2, noise())
    few, many = model.step(state, ahead=3), model.step(state, ahead=9)
    assert torch.equal(few.positions, many.positions[:, :3])
    assert torch.equal(many.positions, state.order[:, 3:12])
    assert_close(few.z, many.z[:, :, :3], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="ahead is 17, must be 1 to 16"):
        model.step(state, ahead=17)


# ---- orders and rounds


@pytest.mark.parametrize(("length", "rounds"), [(16, 5), (16, 16), (16, 1), (256, 64), (5, 12), (1, 3)])
def test_rounds_follow_the_cosine_without_an_empty_one(length: int, rounds: int) -> None:
    spec = TokenSpec(Grid(1, 1, length), decoded=(1, 8, 8), channels=3)
    model = MAR(spec, 8, 1, 1, num_classes=2, head=HEADS["mixture"], rounds=rounds).eval().requires_grad_(False)
    state = model.begin([Condition(label=torch.tensor([0]))], noise(1))
    scales = mar_linear(rounds, 3.0, length)
    assert state.rounds == min(rounds, length)
    masked = length
    for _ in range(state.rounds):
        prediction = model.step(state)
        m = prediction.positions.shape[1]
        assert m == prediction.keep >= 1 and prediction.total == rounds
        model.commit(state, prediction.positions, torch.zeros(1, m, 3))
        masked -= m
        after = 1 + 2 * (length - max(masked, 1)) / length  # the end stays below the scale asked for
        assert_close(scales[prediction.index], torch.full((1, m), after, dtype=torch.float64))
    assert masked == 0 and bool(state.known.all()) and state.length.tolist() == [length]
    with pytest.raises(ValueError, match="rounds are done"):
        model.step(state)
    asked = model.begin([Condition(label=torch.tensor([0]))], noise(1), rounds=1)
    assert asked.rounds == 1 and model.step(asked).positions.shape == (1, length)


def test_unmasking_of_the_published_length() -> None:
    assert unmasking(256, 256) == [*range(255, 0, -1), 1]
    reveal = [before - after for before, after in zip([256, *unmasking(256, 64)], unmasking(256, 64), strict=False)]
    assert reveal[:18] == [1] * 13 + [2, 3, 2, 2, 3] and unmasking(256, 64)[-2:] == [6, 1]


def test_orders_belong_to_the_sample_and_the_rounds_walk_through_them() -> None:
    model = made()
    state = model.begin([LABELS], noise())
    assert torch.equal(state.order.sort(1).values, torch.arange(16).expand(4, -1))
    assert len({tuple(order) for order in state.order.tolist()}) == 4
    again = model.begin([LABELS.select(slice(2, 3))], Noise(3, torch.tensor([2])))
    assert torch.equal(again.order[0], state.order[2])
    for _ in range(state.rounds):
        walked = model.step(state).positions
        start = int(state.length[0])
        assert torch.equal(walked, state.order[:, start : start + walked.shape[1]])
        advance(model, state, 1, noise())


def test_permuting_places_permutes_what_is_said() -> None:
    model, tokens = made(), pictures()
    mask = torch.zeros(4, 16, dtype=torch.bool).index_fill(1, torch.tensor([0, 3, 5, 8, 9]), True)
    before = model.hidden(tokens, mask, LABELS)
    places = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    slots = torch.cat((torch.arange(3), 3 + places))
    model.encoder_position.copy_(model.encoder_position[slots])
    model.decoder_position.copy_(model.decoder_position[slots])
    model.head_position.copy_(model.head_position[places])
    after = model.hidden(tokens[:, places], mask[:, places], LABELS)
    assert_close(after, before[:, places], rtol=0, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_tokens_do_not_depend_on_the_batch(head: str) -> None:
    model = made(head=head)
    whole = generate(model, LABELS, SAMPLER, noise()).tokens
    for row in range(4):
        alone = generate(model, LABELS.select(slice(row, row + 1)), SAMPLER, Noise(3, torch.tensor([row]))).tokens
        assert_close(alone, whole[row : row + 1], rtol=1e-9, atol=1e-9)
    assert not torch.equal(whole, generate(model, LABELS, SAMPLER, noise(seed=4)).tokens)


# ---- given tokens, and going back


def test_given_tokens_stay_and_are_read_from_the_first_round_on() -> None:
    model, given = made(), pictures()
    mask = torch.rand(4, 16, generator=torch.Generator().manual_seed(7)) < torch.tensor([0.2, 0.9, 0.0, 0.5])[:, None]
    state = model.begin([LABELS], noise(), fixed=(given, mask))
    assert torch.equal(state.known, mask)
    first = model.step(state)
    hidden = model.hidden(given, ~mask, LABELS)
    assert_close(first.z[0], hidden.gather(1, first.positions[..., None].expand(-1, -1, 16)), rtol=0, atol=1e-12)
    state = generate(model, LABELS, SAMPLER, noise(), fixed=(given, mask))
    assert torch.equal(state.tokens[mask], given[mask]) and bool(state.known.all())
    alone = generate(
        model,
        LABELS.select(slice(1, 2)),
        SAMPLER,
        Noise(3, torch.tensor([1])),
        fixed=(given[1:2], mask[1:2]),
    )
    assert_close(alone.tokens, state.tokens[1:2], rtol=1e-9, atol=1e-9)
    free = generate(model, LABELS, SAMPLER, noise()).tokens
    assert_close(state.tokens[2], free[2], rtol=1e-9, atol=1e-9) and not torch.equal(state.tokens[3], free[3])


def test_rewinding_forgets_all_but_the_first_of_the_order() -> None:
    model, fixed = made(), (pictures(), torch.zeros(4, 16, dtype=torch.bool))
    fixed[1][0, :2] = True
    state = model.begin([LABELS], noise(), fixed=fixed)
    advance(model, state, 5, noise())
    tokens, length = state.tokens, torch.tensor([0, 3, 5, 16])
    model.rewind(state, length)
    assert state.length.tolist() == [0, 3, 5, 12]
    for row in range(4):
        kept = set(state.order[row, : state.length[row]].tolist()) | set(fixed[1][row].nonzero()[:, 0].tolist())
        assert set(state.known[row].nonzero()[:, 0].tolist()) == kept
    assert torch.equal(state.tokens, torch.where(state.known[..., None], tokens, 0))
    ahead = model.step(state, ahead=6)
    hidden = model.hidden(state.tokens, ~state.known, LABELS)
    assert_close(ahead.z[0], hidden.gather(1, ahead.positions[..., None].expand(-1, -1, 16)), rtol=0, atol=1e-12)
    model.commit(state, ahead.positions, tokens.gather(1, ahead.positions[..., None].expand(-1, -1, 3)))
    assert state.length.tolist() == [6, 9, 11, 16]  # the last row had 4 left and idled in two places
    assert torch.equal(state.tokens[state.known], tokens[state.known])  # but for unknown ones they are back


def test_rejected_tokens_stay_unknown() -> None:
    model = made()
    state = model.begin([LABELS], noise())
    prediction = model.step(state, ahead=4)
    keep = torch.arange(4) < torch.tensor([[0], [1], [4], [2]])
    model.commit(state, prediction.positions, torch.ones(4, 4, 3, dtype=torch.float64), keep)
    assert state.length.tolist() == state.known.sum(1).tolist() == [0, 1, 4, 2]
    assert torch.equal(state.tokens[..., 0] == 1, state.known)
    assert torch.equal(model.step(state, ahead=1).positions[:, 0], state.order.gather(1, state.length[:, None])[:, 0])


# ---- training


def test_the_masked_share_follows_the_truncated_normal_law() -> None:
    normal = torch.distributions.Normal(1.0, 0.25)
    low = normal.cdf(torch.tensor(0.7, dtype=torch.float64))
    for u in (0.0, 0.1, 0.5, 0.9, 1.0):
        share = torch.tensor(masked_share(u, 0.7), dtype=torch.float64)
        assert_close((normal.cdf(share) - low) / (0.5 - low), torch.tensor(u, dtype=torch.float64))
    assert masked_share(0.0, 0.7) == 0.7 and masked_share(1.0, 0.7) == masked_share(0.3, 1.0) == 1.0


def test_loss_given_an_order_and_a_share_is_that_of_their_mask() -> None:
    model, tokens = made(), pictures()
    order = torch.rand(4, 16, generator=torch.Generator().manual_seed(3)).argsort(1)
    t, eps = torch.randint(1000, (2, 4, 16)), torch.randn(2, 4, 16, 3, dtype=torch.float64)
    loss, parts = model.loss(tokens, LABELS, order=order, share=0.7, t=t, noise=eps)
    mask = torch.zeros(4, 16, dtype=torch.bool).scatter(1, order[:, 4:], True)  # ceil(0.7 * 16) = 12
    by_mask, _ = model.loss(tokens, LABELS, mask=mask, t=t, noise=eps)
    each = model.head.loss(model.hidden(tokens, mask, LABELS), tokens, t=t, noise=eps)
    assert_close(loss, by_mask)
    assert_close(loss, each[mask].mean())
    assert parts["masked"] == loss


def test_classes_are_dropped_in_training_alone() -> None:
    model, tokens = made(condition_drop=1.0, dropout=0.0, attention_dropout=0.0, head="mixture"), pictures()
    mask = torch.ones(4, 16, dtype=torch.bool)
    kept, null = (model.loss(tokens, c, mask=mask)[0] for c in (LABELS, LABELS.null()))
    assert_close(model.train().loss(tokens, LABELS, mask=mask)[0], null)
    assert_close(model.loss(tokens, LABELS, mask=mask, keep=torch.ones(4, dtype=torch.bool))[0], kept)


@pytest.mark.parametrize("head", HEADS)
def test_a_few_pictures_are_learned(head: str) -> None:
    torch.manual_seed(0)
    model = MAR(SPEC, 16, 1, 2, num_classes=4, head=HEADS[head], buffer=2, dropout=0.0, attention_dropout=0.0)
    tokens, losses = pictures().float(), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(40):
        loss, _ = model.loss(tokens, Condition(label=torch.arange(4)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < sum(losses[:5]) / 5 - 0.2


# ---- refusals


def test_what_it_cannot_serve_is_refused_with_both_sides() -> None:
    discrete = TokenSpec(Grid(1, 4, 4), decoded=(1, 8, 8), vocab_size=64)
    with pytest.raises(
        ValueError, match=r"MAR predicts continuous tokens, the tokenizer makes discrete.*vocab_size=64"
    ):
        MAR(discrete, 16, 1, 2, num_classes=5)
    field: type[Head] = FieldHead
    with pytest.raises(ValueError, match="MAR computes one hidden state a token, FieldHead needs a velocity"):
        MAR(SPEC, 16, 1, 2, num_classes=5, head=field)
    with pytest.raises(ValueError, match="heads=3 must divide dim=16"):
        MAR(SPEC, 16, 1, 3, num_classes=5)
    with pytest.raises(ValueError, match="rounds=0"):
        MAR(SPEC, 16, 1, 2, num_classes=5, rounds=0)
    model = made()
    with pytest.raises(LabelError, match="class id 5 is out of range"):
        model.begin([Condition(label=torch.tensor([5]))], noise(1))
    with pytest.raises(ValueError, match="rounds is 0"):
        model.begin([LABELS], noise(), rounds=0)
    with pytest.raises(ValueError, match="length is 8, MAR makes all 16 tokens"):
        model.begin([LABELS], noise(), length=8)


# ---- the published size


def their_layout(model: MAR) -> dict[str, Tensor]:
    """Zeros without memory under the original keys and shapes."""
    classes, dim = model.condition.table.weight.shape
    shapes = {"class_emb.weight": (classes - 1, dim), "fake_latent": (1, dim)}
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for theirs, target in MAR_KEYS.items():
        if isinstance(target, tuple):  # a table, with an axis in front
            shapes[theirs] = (1, *own[target[0]])
        elif isinstance(target, str):
            for i in range(len(model.encoder.blocks)):
                shapes[theirs.format(i=i)] = own[target.format(i=i)]
    net = model.head.net
    width, channels = net.embed_token.weight.shape
    shapes |= {
        "diffloss.net.input_proj.weight": (width, channels),
        "diffloss.net.time_embed.mlp.0.weight": (width, 256),
        "diffloss.net.time_embed.mlp.2.weight": (width, width),
        "diffloss.net.cond_embed.weight": (width, dim),
        "diffloss.net.final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "diffloss.net.final_layer.linear.weight": (2 * channels, width),
    }
    for i in range(len(net.branches)):
        block = f"diffloss.net.res_blocks.{i}"
        shapes |= {f"{block}.in_ln.weight": (width,), f"{block}.adaLN_modulation.1.weight": (3 * width, width)}
        shapes |= {f"{block}.mlp.{j}.weight": (width, width) for j in (0, 2)}
    shapes |= {
        name.replace(".weight", ".bias"): shape[:1] for name, shape in shapes.items() if name.startswith("diffloss")
    }
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("name", "tensors"), [("mar-b", 364), ("mar-l", 476), ("mar-h", 604)])
def test_published_checkpoints_have_the_published_size(name: str, tensors: int) -> None:
    entry = entries()[name]
    with torch.device("meta"):
        config = entry.config
        model = MAR(
            TokenSpec(Grid(1, 16, 16), decoded=(1, 256, 256), channels=16),
            config["encoder_embed_dim"],
            config["encoder_depth"],
            config["encoder_num_heads"],
            num_classes=1000,
            head=partial(DiffusionHead, hidden=config["diffloss_w"], depth=config["diffloss_d"]),
        )
    state = their_layout(model)
    assert len(state) == tensors
    loaded = from_published(entry.family, {key: tensor.to("meta") for key, tensor in state.items()}, config)
    assert len(loaded.head.chain) == 100 and entry.recipe["rounds"] == 256
    millions = sum(parameter.numel() for parameter in loaded.parameters()) / 1e6
    assert abs(millions - entry.parameters) < 0.005
    assert loaded.spec == model.spec
    assert Guidance(**entry.recipe["guidance"]).branches == 2


def test_the_base_model_samples_at_full_size() -> None:
    config = {**entries()["mar-b"].config, "num_sampling_steps": "2"}
    with torch.device("meta"):
        spec = TokenSpec(Grid(1, 16, 16), decoded=(1, 256, 256), channels=16)
        model = MAR(spec, 768, 12, 12, num_classes=1000, head=partial(DiffusionHead, hidden=1024, depth=6))
    loaded = from_published("mar", their_layout(model), config)
    state = loaded.begin([Condition(label=torch.tensor([207]))], noise(1))
    with torch.inference_mode():
        prediction = loaded.step(state, ahead=1)
        tokens = prediction.head.sample(prediction.z, Sampler().draw(prediction, noise(1), 0))
    loaded.commit(state, prediction.positions, tokens)
    assert prediction.z.shape == (1, 1, 1, 768) and tokens.shape == (1, 1, 16) and bool(tokens.isfinite().all())
    assert int(state.known.sum()) == 1
