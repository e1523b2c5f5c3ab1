"""LARP's tokenizer: tokens of any number, in no order of space; what is drawn and what is not; learning; refusals."""

from typing import Any

import pytest
import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.testing import assert_close

from layers.record import UnknownName, build
from layers.spec import Sequence, TokenSpec
from tokenizers_vis import CLASSES, from_published
from tokenizers_vis.larp import NORMS, PLACES, LARPTokenizer
from tokenizers_vis.quantizers import ResidualQuantizer, StochasticVectorQuantizer, VectorQuantizer

VIDEO = (4, 8, 12)


def small(tokens: int = 5, dtype: torch.dtype = torch.float64, **options: Any) -> LARPTokenizer:
    """Every parameter random, none at its start value."""
    torch.manual_seed(0)
    settings = {"patch": (2, 4, 4), "dim": 16, "depth": 1, "heads": 2, **options}
    tokenizer = LARPTokenizer(VIDEO, tokens, StochasticVectorQuantizer(32, 4, temperature=0.3), **settings)
    for parameter in tokenizer.parameters():
        nn.init.normal_(parameter, std=max(1, parameter[0].numel()) ** -0.5)
    return tokenizer.to(dtype).eval()


def clips(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, 3, *VIDEO, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2 - 1


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_clip_becomes_any_number_of_tokens(tokens: int) -> None:
    tokenizer = small(tokens)
    assert tokenizer.spec == TokenSpec(Sequence(tokens), decoded=VIDEO, vocab_size=32)
    assert tokenizer.prefixes == (tokens,)
    ids = tokenizer.encode(clips(2))
    assert ids.shape == (2, tokens) and ids.dtype == torch.int64
    assert tokenizer.decode(ids).shape == (2, 3, *VIDEO)


def test_a_clip_does_not_depend_on_its_batch() -> None:
    tokenizer = small()
    ids = tokenizer.encode(clips(5))
    for row in range(5):
        assert torch.equal(tokenizer.encode(clips(5)[row : row + 1])[0], ids[row])
        assert_close(tokenizer.decode(ids[row : row + 1])[0], tokenizer.decode(ids)[row])


def test_every_query_looks_at_the_whole_clip_and_every_pixel_at_every_token() -> None:
    tokenizer, clip = small(), clips(1).requires_grad_()
    z = tokenizer.latent(clip)
    for place in range(5):
        (seen,) = torch.autograd.grad(z[0, place].sum(), clip, retain_graph=True)
        assert (seen != 0).all()
    codes = tokenizer.embed(torch.arange(5)[None]).detach().requires_grad_()
    for frame, row, column in ((0, 0, 0), (1, 7, 11), (3, 4, 5)):
        pixel = tokenizer.pixels(codes)[0, 0, frame, row, column]
        (seen,) = torch.autograd.grad(pixel, codes)
        assert (seen.abs().amax(-1) > 0).all()


def test_pixels_lie_where_their_patches_are_cut() -> None:
    """With a decoder that says nothing but its own place, equal places of grids give equal patches."""
    tokenizer = small()
    for block in tokenizer.decoder.blocks:
        nn.init.zeros_(block.attn.proj.weight), nn.init.zeros_(block.attn.proj.bias)
    said = tokenizer.out(
        tokenizer.out_norm(tokenizer.decoder(torch.zeros(1, 1, 16).double(), tokenizer.at_patches()[None]))
    )
    clip = tokenizer.decode(tokenizer.encode(clips(1)))[0]
    for t, h, w in ((0, 0, 0), (0, 1, 2), (1, 0, 1)):
        patch = said[0, (t * 2 + h) * 3 + w].view(2, 4, 4, 3)  # frames, rows, columns, channels
        found = clip[:, 2 * t : 2 * t + 2, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4]
        assert_close(found, 2 * patch.permute(3, 0, 1, 2) - 1)


def test_encode_is_certain_without_noise_and_follows_given_uniforms() -> None:
    tokenizer = small()
    clip, law = clips(3), tokenizer.quantizer.probs(tokenizer.latent(clips(3)))
    certain = tokenizer.encode(clip)
    assert torch.equal(certain, law.argmax(-1)) and torch.equal(tokenizer.train().encode(clip), certain)
    uniforms = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    drawn = tokenizer.encode(clip, noise=uniforms)
    assert torch.equal(drawn, (law.cumsum(-1) <= uniforms[..., None] * law.sum(-1, keepdim=True)).sum(-1))
    assert (drawn != certain).any()


def test_forward_draws_in_training_and_gives_every_parameter_a_gradient() -> None:
    tokenizer, clip = small(kinds=PLACES).train(), clips(2)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, parts = tokenizer(clip)
        second, _ = tokenizer(clip)
    assert (first - second).abs().max() > 0
    assert parts.keys() == {"codebook", "commitment", "ids", "codes", "stats"}
    assert torch.equal(parts["codes"], tokenizer.embed(parts["ids"]))
    assert torch.equal(first, tokenizer.decode(parts["ids"]))
    (first.square().mean() + parts["codebook"] + parts["commitment"]).backward()
    assert [name for name, parameter in tokenizer.named_parameters() if not parameter.grad.abs().sum() > 0] == []
    assert tokenizer.last_layer.grad.shape == (96, 16)


@pytest.mark.parametrize("norm", NORMS)
def test_learned_tables_and_norms_are_part_of_the_model(norm: str) -> None:
    tokenizer = small(learned=PLACES, kinds=PLACES, norm=norm)
    learned = {name for name, _ in tokenizer.named_parameters() if name.startswith("at_")}
    axes = {"at_video": 3, "at_queries": 1, "at_codes": 1, "at_patches": 3}
    assert learned == {
        f"{place}.{part}" for place, n in axes.items() for part in ("kind", *(f"axis_{i}" for i in range(n)))
    }
    assert tokenizer.at_video().shape == (12, 16)
    t, h, w = (getattr(tokenizer.at_video, f"axis_{i}") for i in range(3))
    assert_close(tokenizer.at_video()[1 * 6 + 1 * 3 + 2], t[1] + h[1] + w[2] + tokenizer.at_video.kind)
    assert tokenizer.encode(clips(2)).shape == (2, 5)


@pytest.mark.parametrize(("norm", "axes"), [("batch", (0,)), ("batch and tokens", (0, 1))])
def test_a_norm_over_the_batch_tells_new_clips_apart(norm: str, axes: tuple[int, ...]) -> None:
    """A new encoder says nearly the same of all clips, and a code has length 1: without it all get the same code."""
    torch.manual_seed(0)
    tokenizer = LARPTokenizer(
        VIDEO, 5, VectorQuantizer(32, 4, normalize=True), patch=(2, 4, 4), dim=16, depth=1, heads=2, norm=norm
    ).double()
    clip = clips(16)
    plain = tokenizer.to_code(
        tokenizer.encoder(
            rearrange(tokenizer.patches((clip + 1) / 2), "b d t h w -> b (t h w) d") + tokenizer.at_video(),
            repeat(tokenizer.at_queries(), "n d -> b n d", b=16),
        )
    )
    z = tokenizer.train().latent(clip)
    variance, mean = torch.var_mean(plain, dim=axes, correction=0, keepdim=True)
    assert_close(z, (plain - mean) / (variance + 1e-5).sqrt())  # so of mean 0, and of variance 1 but for what is added
    assert len(tokenizer(clip)[1]["ids"].unique()) > len(tokenizer.quantizer(plain).ids.unique())


def test_a_local_start_ties_tokens_to_the_patches_of_their_numbers() -> None:
    torch.manual_seed(0)
    tokenizer = LARPTokenizer(
        VIDEO, 12, VectorQuantizer(32, 8), patch=(2, 4, 4), dim=128, depth=2, heads=4, learned=PLACES, local_start=True
    ).double()
    nn.init.normal_(tokenizer.out.weight)
    black = torch.full((1, 3, *VIDEO), -1.0, dtype=torch.float64)
    codes = torch.zeros(1, 12, 8, dtype=torch.float64)
    own = torch.zeros(2)  # how many tokens answer most to their patch, and patches to their code; by chance it is 1
    for place in range(12):
        t, h, w = place // 6, place // 3 % 2, place % 3
        lit, said = black.clone(), codes.clone()
        lit[:, :, 2 * t : 2 * t + 2, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4] = -0.8
        said[:, place] = 0.2
        heard = (tokenizer.latent(lit) - tokenizer.latent(black))[0].norm(dim=-1)
        shown = (tokenizer.pixels(said) - tokenizer.pixels(codes))[0].square()
        shown = reduce(shown, "c (t pt) (h ph) (w pw) -> (t h w)", "sum", t=2, h=2, w=3)
        own += torch.stack((heard.argmax() == place, shown.argmax() == place))
    assert own.min() > 8


def test_the_start_of_a_clip_is_coded_with_its_last_frame_standing_still() -> None:
    tokenizer, clip = small(), clips(2)
    still = torch.cat((clip[:, :, :2], clip[:, :, 1:2], clip[:, :, 1:2]), dim=2)
    assert torch.equal(tokenizer.encode_start(clip[:, :, :2]), tokenizer.encode(still))
    assert torch.equal(tokenizer.encode_start(clip), tokenizer.encode(clip))
    uniforms = torch.rand(2, 5, dtype=torch.float64)
    assert torch.equal(tokenizer.encode_start(clip[:, :, :2], noise=uniforms), tokenizer.encode(still, noise=uniforms))
    with pytest.raises(ValueError, match="0 frames are given, a clip has 4: give 1 to 4"):
        tokenizer.encode_start(clip[:, :, :0])


def test_a_few_clips_are_learned() -> None:
    torch.manual_seed(0)
    record = {"class_path": "StochasticVectorQuantizer", "init_args": {"vocab_size": 64, "dim": 8, "revive_below": 0.1}}
    arguments = {
        "video": VIDEO,
        "tokens": 8,
        "quantizer": record,
        "patch": (2, 4, 4),
        "dim": 32,
        "depth": 2,
        "heads": 2,
    }
    tokenizer = build({"class_path": "LARPTokenizer", "init_args": arguments}, CLASSES).train()
    clip = repeat(clips(4, torch.float32)[..., :2, :1, :3], "b c t h w -> b c (t pt) (h ph) (w pw)", pt=2, ph=8, pw=4)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    first, _ = tokenizer(clip)
    assert torch.equal(first, torch.full_like(first, -1.0))  # the read-out starts at zero: black
    for _ in range(280):
        again, parts = tokenizer(clip)
        loss = (again - clip).square().mean() + 0.1 * parts["codebook"] + 0.025 * parts["commitment"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokenizer.eval()
    with torch.no_grad():
        error = (tokenizer.decode(tokenizer.encode(clip)) - clip).square().mean()
    assert error < 0.05 * clip.var()


def test_refusals_name_both_sides() -> None:
    quantizer, tokenizer = VectorQuantizer(8, 4), small()
    refused = [
        (
            lambda: LARPTokenizer((4, 8, 10), 2, quantizer, patch=(2, 4, 4)),
            r"\(4, 8, 10\) is not divisible by patch \(2, 4, 4\)",
        ),
        (lambda: LARPTokenizer(VIDEO, 2, quantizer, patch=(2, 4, 4), dim=16, heads=3), "heads=3 must divide dim=16"),
        (
            lambda: LARPTokenizer(VIDEO, 2, ResidualQuantizer(lambda: VectorQuantizer(8, 4), 2), patch=(2, 4, 4)),
            "gives 2 ids a vector",
        ),
        (lambda: tokenizer.encode(clips(1)[:, :, :2]), r"got clips \(1, 3, 2, 8, 12\), made for \(B, 3, 4, 8, 12\)"),
        (lambda: tokenizer.decode(torch.zeros(1, 4, dtype=torch.int64)), r"got tokens \(1, 4\), decodes \(B, 5\)"),
        (lambda: tokenizer.decode(torch.full((1, 5), 32)), "ids from 32 to 32, the codebook has 0 to 31"),
        (
            lambda: tokenizer.decode(torch.zeros(1, 5, dtype=torch.int64), present=torch.ones(1, 5) > 0),
            "whole sequences",
        ),
        (
            lambda: small(local_start=True),
            r"needs a token a patch, 12, and learned .*; got 5 tokens, learned \('queries',\)",
        ),
        (lambda: small(learned=("query",)), "place 'query' is not known; did you mean 'queries'"),
    ]
    for attempt, words in refused:
        with pytest.raises(ValueError, match=words):
            attempt()


def test_configurations_of_other_models_are_refused() -> None:
    scheme = {"name": "vq", "args": {"codebook_size": 8, "l2_normalized": True}}
    bottleneck = {"name": "bottleneck", "args": {"bottleneck_dim": 4, "regularizer": scheme}}
    good = {"bottleneck": bottleneck, "prior_model": {"name": "none"}}

    def inner(**changes: Any) -> dict[str, Any]:
        return {"bottleneck": {"args": {**bottleneck["args"], **changes}}}

    refused: list[tuple[dict[str, Any], str]] = [
        ({"decoder_patch_size": 4}, r"decoder's patches \(4, 4\) must be the encoder's \(4, 8\)"),
        ({"encoder_name": "transformer_encoder_fused"}, "encoder_name is 'transformer_encoder_fused', must be"),
        (inner(regularizer={"name": "skl", "args": {}}), "regularizer is 'skl', must be 'vq'"),
        (
            inner(regularizer={"name": "vq", "args": {"codebook_size": 8, "stochastic": True}}),
            "l2_normalized must be true",
        ),
        (inner(norm="ln_q"), "norm 'ln_q' is not known"),
    ]
    for change, words in refused:
        with pytest.raises(ValueError, match=words):
            from_published("larp", {}, {**good, **change})
    with pytest.raises(UnknownName, match="config key 'frames' is not known"):
        from_published("larp", {}, {**good, "frames": 16})
