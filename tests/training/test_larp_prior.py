"""LARP's prior: what it may see, how its codes are mixed, what learns from its loss, and that it makes codes guessable."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from layers.keymap import CheckpointMismatch
from layers.record import UnknownName
from training.larp_prior import LARPPrior, WithPrior, larp_prior_from_published

B, N, C, V = 2, 6, 4, 16


def made(**options: object) -> LARPPrior:
    torch.manual_seed(0)
    prior = LARPPrior(N, C, **{"dim": 16, "depth": 2, "heads": 2, "dropout": 0.0, **options}).double()
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.3)
    return prior.eval()


def book() -> Tensor:
    return functional.normalize(torch.randn(V, C, generator=torch.Generator().manual_seed(1)).double(), dim=-1)


def ids() -> Tensor:
    return torch.randint(V, (B, N), generator=torch.Generator().manual_seed(2))


def test_a_guess_depends_on_the_codes_before_it_alone() -> None:
    prior, codes = made(), book()[ids()]
    before = prior(codes)
    assert_close(before.norm(dim=-1), torch.ones(B, N).double())
    assert_close(before[:, 0], codes[:, 0])
    for place in range(N):
        changed = codes.clone()
        changed[:, place] = codes[:, place].flip(-1)
        moved = (prior(changed) - before).abs().amax((0, 2)) > 1e-9
        assert moved[1:].tolist() == [at > place for at in range(1, N)]


def test_the_replaced_share_rises_in_the_first_part_of_training() -> None:
    prior = made(share=0.5, ramp=0.3)
    assert [prior.replaced(progress) for progress in (0.0, 0.15, 0.3, 1.0)] == pytest.approx([0.0, 0.25, 0.5, 0.5])
    assert made(share=1.0, ramp=0.0).replaced(0.0) == 1.0


def test_one_round_is_the_cross_entropy_of_the_next_code() -> None:
    prior, codes = made(rounds=1, temperature=0.5), book()[ids()]
    expected = functional.cross_entropy(
        (2 * prior(codes)[:, 1:] @ book().t()).float().flatten(0, 1), ids()[:, 1:].flatten()
    )
    assert_close(prior.loss(codes, ids(), book(), progress=1.0), expected)


@pytest.mark.parametrize("every_round", [True, False])
def test_the_second_round_reads_what_was_drawn_where_the_uniforms_say_so(every_round: bool) -> None:
    prior, codes, progress = made(every_round=every_round), book()[ids()], 0.15  # a quarter of the codes
    mixing = torch.tensor([[0.1, 0.9, 0.24, 0.26, 0.0], [0.5, 0.2, 0.7, 0.3, 0.9]])
    drawing = torch.rand(1, B, N - 1, generator=torch.Generator().manual_seed(3))
    first = prior.logits(codes, book())
    law = first.double().softmax(-1)
    drawn = (law.cumsum(-1) <= drawing[0][..., None]).sum(-1)
    mixed = torch.where(mixing < 0.25, drawn, ids()[:, 1:])
    second = prior.logits(book()[torch.cat((ids()[:, :1], mixed), dim=1)], book())
    losses = [functional.cross_entropy(logits.flatten(0, 1), ids()[:, 1:].flatten()) for logits in (first, second)]
    found = prior.loss(codes, ids(), book(), progress, mixing=mixing, drawing=drawing)
    assert (mixed != ids()[:, 1:]).any()
    assert_close(found, sum(losses) / 2 if every_round else losses[1])


def test_the_encoder_learns_from_it_and_the_codebook_does_not() -> None:
    prior, codes, rows = made(), book()[ids()].requires_grad_(), book().requires_grad_()
    prior.loss(codes, ids(), rows, progress=0.1).backward()
    assert rows.grad is None
    assert (codes.grad[:, :-1].abs().amax(-1) > 0).all() and not codes.grad[:, -1].any()  # the last is never read
    assert all(parameter.grad.abs().sum() > 0 for parameter in prior.parameters() if parameter is not prior.position)


class Coder(nn.Module):
    """A tokenizer of vectors: the codes are rows that learn, the picture is their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(book())

    def codebook(self) -> Tensor:
        return self.rows

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        codes = images + self.rows.sum() - self.rows.sum().detach()
        return codes.sum(1), {"ids": ids(), "codes": codes, "codebook": self.rows.square().mean()}


def test_beside_a_tokenizer_it_is_one_more_term() -> None:
    coder, prior = Coder(), made(rounds=1)
    images = book()[ids()]
    both = WithPrior(coder, prior)
    picture, parts = both(images, progress=0.5)
    assert torch.equal(picture, coder(images)[0]) and parts.keys() == {"ids", "codebook", "prior"}
    assert_close(parts["prior"], prior.loss(images, ids(), book(), progress=0.5))
    parts["prior"].backward()
    assert coder.rows.grad.abs().sum() > 0  # through the codes
    names = {name.split(".")[0] for name in both.state_dict()}
    assert names == {"module", "prior"}


def test_it_learns_a_rule_of_order() -> None:
    """Of two codes that take turns, the one that follows is certain."""
    torch.manual_seed(0)
    prior, rows = LARPPrior(8, C, dim=32, depth=1, heads=2, temperature=0.1).train(), book().float()
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)
    for step in range(120):
        start = torch.randint(2, (16, 1))
        turns = (start + torch.arange(8)) % 2
        loss = prior.loss(rows[turns], turns, rows, progress=step / 120)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    turns = torch.arange(8)[None] % 2
    logits = prior.eval().logits(rows[turns], rows)
    assert torch.equal(logits.argmax(-1), turns[:, 1:])


def test_the_prior_of_a_file_needs_every_key_and_knows_its_size() -> None:
    config = {"bottleneck": {"args": {"bottleneck_dim": C}}}
    small = {"n_layer": 1, "n_head": 2, "n_embd": 16, "max_seq_len": N}
    shapes = {"pos_emb": (1, N, 16)}
    for name, rows, columns in (
        ("input_proj", 16, C),
        ("head", C, 16),
        ("blocks.0.mlp.0", 64, 16),
        ("blocks.0.mlp.2", 16, 64),
    ):
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    for name in ("key", "query", "value", "proj"):
        shapes |= {f"blocks.0.attn.{name}.weight": (16, 16), f"blocks.0.attn.{name}.bias": (16,)}
    for name in ("ln_f", "blocks.0.ln1", "blocks.0.ln2"):
        shapes |= {f"{name}.weight": (16,), f"{name}.bias": (16,)}
    state = {f"prior_model.{key}": torch.randn(shape) for key, shape in shapes.items()}
    prior = larp_prior_from_published(
        {**state, "x_embedder.proj.bias": torch.zeros(3)}, {**config, "prior_model": {"args": small}}
    )
    assert (prior.rounds, prior.share, prior.ramp, prior.every_round) == (2, 0.5, 0.3, True)
    for key in state:
        with pytest.raises(CheckpointMismatch, match=r"not in the checkpoint|needs 3 parts"):
            larp_prior_from_published(
                {k: v for k, v in state.items() if k != key}, {**config, "prior_model": {"args": small}}
            )
    with pytest.raises(UnknownName, match="prior_model 'gptc-T' is not known"):
        larp_prior_from_published(state, {**config, "prior_model": {"name": "gptc-T", "args": {}}})
    with pytest.raises(ValueError, match=r"one rate of dropout, the configuration says \[0.0, 0.1\]"):
        larp_prior_from_published(state, {**config, "prior_model": {"args": {**small, "attn_pdrop": 0.0}}})
