"""The next-token generator on tokens of clips: absolute positions, continuing a given clip."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from generators.next_token import NextToken
from layers.noise import Noise
from layers.sincos import sincos
from layers.spec import Condition, Sequence, TokenSpec
from sampling.decode import generate
from sampling.sampler import Sampler

SPEC = TokenSpec(Sequence(7), decoded=(4, 8, 8), vocab_size=11)


def randomised(**settings: object) -> NextToken:
    torch.manual_seed(0)
    given = {"spec": SPEC, "dim": 16, "depth": 2, "heads": 2, "mlp_hidden": 24, "positions": "learned", **settings}
    model = NextToken(**given)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def tokens(rows: int, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(seed))


KINDS = {
    "class": (Condition(label=torch.tensor([0, 4, 2])), {"num_classes": 5}),
    "clip": (Condition(clip=tokens(3, 4, seed=1)), {"clip_tokens": 4}),
}


@pytest.mark.parametrize("positions", ["learned", "sincos", "rotary"])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_the_cache_equals_teacher_forcing(kind: str, positions: str) -> None:
    condition, settings = KINDS[kind]
    model, given = randomised(positions=positions, **settings), tokens(3)
    full, state = model.logits(given, condition), model.begin([condition], Noise(0, torch.arange(3)))
    for place in range(7):
        prediction = model.step(state)
        assert_close(prediction.head.logits(prediction.z)[0, :, 0], full[:, place])
        model.commit(state, prediction.positions, given[:, place : place + 1])
    model.step(state)  # a finished row idles, without a place of its own
    model.rewind(state, torch.tensor([7, 3, 0]))
    drafted = model.score(state, given[:, :4])
    assert_close(drafted.head.logits(drafted.z)[0, 2], full[2, :5])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_logits_depends_on_the_condition_and_earlier_tokens_only(kind: str) -> None:
    condition, settings = KINDS[kind]
    model, given = randomised(**settings), tokens(3)
    before = model.logits(given, condition)
    for place in range(6):
        changed = given.clone()
        changed[:, place] = (changed[:, place] + 1) % 11
        moved = (model.logits(changed, condition) - before).abs().amax((0, 2)) > 1e-9
        assert moved.tolist() == [at > place for at in range(7)]
    other = condition.select(torch.tensor([1, 2, 0]))
    assert ((model.logits(given, other) - before).abs().amax(-1) > 1e-9).all()


def test_every_token_of_the_clip_counts_and_its_place() -> None:
    condition, settings = KINDS["clip"]
    model, given = randomised(**settings), tokens(3)
    before = model.logits(given, condition)
    for place in range(4):
        clip = condition.clip.clone()
        clip[:, place] = (clip[:, place] + 1) % 11
        assert ((model.logits(given, Condition(clip=clip)) - before).abs().amax(-1) > 1e-9).all()
    assert (model.logits(given, Condition(clip=condition.clip.flip(1))) - before).abs().max() > 1e-9


def test_positions_are_one_row_a_slot() -> None:
    model = randomised(positions="sincos", **KINDS["clip"][1])
    assert_close(model.position, sincos(torch.arange(11), 16).double())  # 4 of the clip, a separator, 6 that are fed
    learned = randomised(**KINDS["clip"][1])
    assert learned.position.shape == (11, 16) and learned.rotary is None
    assert learned.embed.weight.shape == (12, 16)  # the separator has a row
    learned.loss(tokens(2), Condition(clip=tokens(2, 4)))[0].backward()
    assert (learned.position.grad.abs().amax(-1) > 0).all() and learned.embed.weight.grad[11].abs().max() > 0


def test_a_clip_is_never_dropped() -> None:
    condition, settings = KINDS["clip"]
    model = randomised(condition_drop=1.0, dropout=0.0, token_dropout=0.0, **settings)
    assert torch.equal(model.train().loss(tokens(3), condition)[0], model.eval().loss(tokens(3), condition)[0])
    state = generate(model, condition, Sampler(), Noise(0, torch.arange(3)))
    assert int(state.tokens.max()) < 11  # the separator is no token
    with pytest.raises(ValueError, match="no null condition: sample without guidance"):
        model.begin([condition, condition.null()], Noise(0, torch.arange(3)))


def test_refusals_name_both_sides() -> None:
    model = randomised(**KINDS["clip"][1])
    with pytest.raises(ValueError, match=r"continues a clip of 4 tokens: the condition has 5 tokens"):
        model.logits(tokens(1), Condition(clip=tokens(1, 5)))
    with pytest.raises(ValueError, match=r"continues a clip of 4 tokens: the condition has no clip"):
        model.logits(tokens(1), Condition(label=torch.tensor([1])))
    with pytest.raises(
        ValueError, match=r"num_classes or text_dim or clip_tokens, one of them: got .*'num_classes': 5"
    ):
        randomised(num_classes=5, clip_tokens=4)
    with pytest.raises(ValueError, match="positions is 'absolute', must be rotary, rotary_line, learned or sincos"):
        randomised(num_classes=5, positions="absolute")
