"""Next-token prediction with places along one line: the table, the cache against teacher forcing, given first tokens."""

import pytest
import torch
from torch import Tensor

from generators.next_token import NextToken
from layers.noise import Noise
from layers.rotary import rotary_table
from layers.spec import Condition, Grid, Sequence, TokenSpec
from sampling.decode import generate
from sampling.guidance import Guidance
from sampling.sampler import Sampler

SPEC = TokenSpec(Sequence(12), decoded=(1, 16, 16), vocab_size=23)
GUIDED = Sampler(guidance=Guidance(scale=1.2, schedule="linspace", end=4.0))


def model(spec: TokenSpec = SPEC, positions: str = "rotary_line") -> NextToken:
    torch.manual_seed(0)
    made = NextToken(spec, dim=32, depth=2, heads=4, num_classes=6, positions=positions)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.double().eval()


def labels(*values: int) -> Condition:
    return Condition(label=torch.tensor(values))


def draw(made: NextToken, condition: Condition, fixed: tuple[Tensor, Tensor] | None = None, seed: int = 0) -> Tensor:
    return generate(made, condition, GUIDED, Noise(seed, torch.arange(condition.rows)), fixed=fixed).tokens


def test_the_condition_has_place_0_and_token_i_place_i_plus_1() -> None:
    wanted = rotary_table(torch.arange(13)[:, None], 8)
    assert torch.equal(model().rotary[0], wanted)
    square = TokenSpec(Grid(1, 3, 4), decoded=(1, 12, 16), vocab_size=23)
    assert torch.equal(model(square).rotary[0], wanted)  # a grid is read as a line too
    assert (model(positions="rotary").rotary[0, 0] == 0).all()  # not so the places of the layout


def test_a_line_is_decoded_as_it_was_taught() -> None:
    """Tokens drawn with a cache, one at a time, are those that the laws of teacher forcing give under the same noise."""
    made, condition = model(), labels(0, 5, 3)
    tokens = draw(made, condition).clone()
    kept, dropped = (made.logits(tokens, branch) for branch in (condition, condition.null()))
    scales = GUIDED.guidance.scales(12)[:, None]
    law = (dropped + scales * (kept - dropped)).softmax(-1).contiguous()
    uniform = Noise(0, torch.arange(3)).uniform("token", torch.arange(12))
    assert torch.equal(
        tokens, torch.searchsorted(law.cumsum(-1), uniform[..., None].contiguous(), right=True).squeeze(-1)
    )


@pytest.mark.parametrize("kept", [1, 8])
def test_given_first_tokens_stay_and_another_class_goes_on_from_them(kept: int) -> None:
    """Layout control: the first tokens of a reference for every row, each row with a class of its own."""
    made = model()
    reference = draw(made, labels(0))
    mask = (torch.arange(12) < kept).expand(4, -1)
    classes = labels(0, 1, 2, 3)
    found = draw(made, classes, (reference.expand(4, -1), mask))
    assert torch.equal(found[:, :kept], reference[:, :kept].expand(4, -1))
    assert torch.equal(found[0], reference[0])  # its own class, its own noise: it goes on as it did
    state = generate(made, labels(3), GUIDED, Noise(0, torch.tensor([3])), fixed=(reference, mask[:1]))
    assert torch.equal(state.tokens[0], found[3])  # a row does not depend on the others
    assert (found[1:, kept:] != draw(made, classes)[1:, kept:]).any()


def test_positions_that_are_not_known_are_named() -> None:
    with pytest.raises(ValueError, match="positions is 'line', must be rotary, rotary_line, learned or sincos"):
        model(positions="line")
