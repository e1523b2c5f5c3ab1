"""TiTok: tokens that no neighbour in the batch changes, both kinds of them, the caption, the two stages, refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from layers.spec import Condition, Grid, Sequence
from tokenizers_vis.maskgit_vq import MaskGITVQTokenizer
from tokenizers_vis.quantizers import ResidualQuantizer, VectorQuantizer
from tokenizers_vis.titok import CodeMixture, PatchPixels, TiTokTokenizer

SIZES = {
    f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("dim", 32), ("depth", 2), ("heads", 2))
}
SIZES |= {"encoder_patch": 4, "decoder_patch": 4}
IMAGES = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
TEXT = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(2))


def codes() -> VectorQuantizer:
    return VectorQuantizer(24, 6, normalize=True)


def small(**changes: object) -> TiTokTokenizer:
    """Random weights that make the tokens of different pictures different."""
    torch.manual_seed(0)
    given = {"image_size": (16, 24), "tokens": 5, **SIZES, **changes}
    if "channels" not in given:
        given.setdefault("quantizer", codes())
    tokenizer = TiTokTokenizer(**given).eval()
    for name, parameter in tokenizer.named_parameters():
        if name.startswith(("encoder", "decoder")) and parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return tokenizer


def test_tokens_are_a_line_and_do_not_depend_on_the_rest_of_the_batch() -> None:
    tokenizer, images = small().double(), IMAGES.double()
    tokens = tokenizer.encode(images)
    assert tokenizer.spec.layout == Sequence(5) and tokenizer.spec.vocab_size == 24
    assert tokens.shape == (3, 5) and tokens.dtype == torch.int64 and len(tokens.unique(dim=0)) > 1
    assert tokens.equal(tokenizer.encode(images))
    assert tokens.equal(torch.cat([tokenizer.encode(one[None]) for one in images]))
    shown = tokenizer.decode(tokens)
    assert shown.shape == images.shape
    assert_close(shown, torch.cat([tokenizer.decode(one[None]) for one in tokens]))
    assert_close(tokenizer.embed(tokens), tokenizer.codebook()[tokens])


def test_forward_shows_what_decode_shows() -> None:
    tokenizer = small()
    shown, parts = tokenizer(IMAGES)
    assert parts["ids"].equal(tokenizer.encode(IMAGES))
    assert_close(shown, tokenizer.decode(parts["ids"]))


def test_the_legacy_layout_reads_the_latents_across() -> None:
    plain, legacy = small(), small(legacy_layout=True)
    legacy.load_state_dict(plain.state_dict())
    kept = []
    plain.encoder.norm.register_forward_hook(lambda module, given, out: kept.append(out))
    plain.encode(IMAGES)
    latents = kept[0].flatten(1)  # (B, K D), token after token
    across = torch.stack(
        [latents[:, n :: plain.spec.length] for n in range(5)], 1
    )  # token n: every K-th number from n on
    assert_close(legacy.encoder((IMAGES + 1) / 2), plain.encoder.out(across))


def test_continuous_tokens_are_the_scaled_posterior() -> None:
    plain, scaled = small(channels=4), small(channels=4, scale=0.5)
    noise = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(3))
    law = plain.posterior(IMAGES)
    assert plain.spec.channels == 4 and plain.spec.vocab_size is None
    assert_close(plain.encode(IMAGES), law.mean)
    assert_close(scaled.encode(IMAGES, noise=noise), 0.5 * (law.mean + law.stddev * noise))
    assert_close(scaled.decode(scaled.encode(IMAGES)), plain.decode(law.mean))


def test_kl_is_the_divergence_from_the_standard_normal() -> None:
    tokenizer = small(channels=4)
    mean, logvar = tokenizer.encoder((IMAGES + 1) / 2).chunk(2, -1)
    wanted = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum((1, 2)).mean()
    assert_close(tokenizer(IMAGES)[1]["kl"], wanted)


def test_a_patch_is_row_column_colour() -> None:
    pixels = PatchPixels(2)
    torch.nn.init.dirac_(pixels.out.weight)
    torch.nn.init.zeros_(pixels.out.bias)
    x = torch.arange(2 * 12).reshape(1, 2, 12).float()  # a grid of 1 x 2 patches
    wanted = [[[0, 3, 12, 15], [6, 9, 18, 21]], [[1, 4, 13, 16], [7, 10, 19, 22]], [[2, 5, 14, 17], [8, 11, 20, 23]]]
    assert_close(pixels(x, 1)[0], torch.tensor(wanted).float())


# ---- the caption


def captioned(**condition: Tensor) -> Condition:
    return Condition(text=TEXT, **condition)


def test_the_decoder_reads_the_caption() -> None:
    tokenizer = small(text_slots=5, text_dim=7)
    tokens = tokenizer.encode(IMAGES)
    with_text, without = tokenizer.decode(tokens, condition=captioned()), tokenizer.decode(tokens)
    assert (with_text - without).abs().amax((1, 2, 3)).min() > 1e-3
    other = tokenizer.decode(tokens, condition=Condition(text=TEXT.flip(0)))
    assert (with_text - other).abs().amax((1, 2, 3))[[0, 2]].min() > 1e-3  # the middle one has its own
    assert_close(with_text[1], other[1])


def test_a_dropped_caption_and_hidden_positions_are_not_looked_at() -> None:
    tokenizer = small(text_slots=5, text_dim=7).double()
    tokens, text = tokenizer.encode(IMAGES.double()), TEXT.double()
    keep, mask = torch.tensor([True, False, True]), torch.tensor([[True] * 3 + [False] * 2]).expand(3, 5)
    shown = tokenizer.decode(tokens, condition=Condition(text=text, text_mask=mask, keep=keep))
    hidden = text.masked_fill(~mask[..., None], 9.0)
    hidden[1] = -4.0
    assert_close(shown, tokenizer.decode(tokens, condition=Condition(text=hidden, text_mask=mask, keep=keep)))
    assert_close(shown[1:2], tokenizer.decode(tokens[1:2]))
    assert_close(tokenizer.decode(tokens, condition=Condition(text=text).null()), tokenizer.decode(tokens))
    assert_close(
        tokenizer.decode(tokens, condition=Condition(text=text, text_mask=torch.ones(3, 5, dtype=torch.bool))),
        tokenizer.decode(tokens, condition=Condition(text=text)),
    )


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channels": 4, "quantizer": codes()}, "give a quantizer"),
        ({"quantizer": ResidualQuantizer(codes, 2)}, "ResidualQuantizer gives 2 ids"),
        ({"channels": 4, "scale": 0.0}, "scale is 0.0"),
        ({"scale": 0.5}, "scale is 0.5, must be positive, and 1 for discrete"),
        ({"image_size": 18}, "18 x 18 is not divisible by encoder_patch=4"),
        ({"decoder_patch": 3}, "16 x 24 is not divisible by decoder_patch=3"),
        ({"pixels": CodeMixture(8, 4, 4, (1, 1), 1, 2)}, "decoder_patch is 4, a code of pixels stands for 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small(**changes)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda t: t.encode(IMAGES[..., :16]), r"got images \(3, 3, 16, 16\), made for \(B, 3, 16, 24\)"),
        (lambda t: t.decode(torch.zeros(2, 4, dtype=torch.long)), r"got tokens \(2, 4\), decodes \(B, 5\)"),
        (lambda t: t.decode(torch.full((2, 5), 24)), "ids from 24 to 24, the codebook has 0 to 23"),
        (lambda t: t.decode(torch.zeros(2, 5).long(), present=torch.ones(2, 5).bool()), "present must be None"),
        (lambda t: t.posterior(IMAGES), "no posterior"),
        (
            lambda t: t.decode(torch.zeros(3, 5).long(), condition=Condition(text=TEXT[:, :4])),
            r"got text \(3, 4, 7\), 3 pictures are decoded with \(3, 5, 7\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call: Callable[[TiTokTokenizer], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(small(text_slots=5, text_dim=7))


def test_continuous_tokens_have_no_codebook() -> None:
    tokenizer = small(channels=4)
    with pytest.raises(ValueError, match="no codebook"):
        tokenizer.codebook()
    with pytest.raises(ValueError, match=r"decodes \(B, 5, 4\)"):
        tokenizer.decode(torch.zeros(2, 5, 3))


# ---- training


def pictures(count: int) -> Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(4)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")


def learn(tokenizer: TiTokTokenizer, images: Tensor, steps: int, weights: dict[str, float]) -> list[float]:
    """The loss, step by step: the squared error where there is a reconstruction, and the weighted terms."""
    tokenizer.train()
    optimizer = torch.optim.Adam([p for p in tokenizer.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(steps):
        again, parts = tokenizer(images)
        loss = sum(weight * parts[name] for name, weight in weights.items())
        loss = loss if again is None else loss + (again - images).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tokenizer.eval()
    return losses


def test_a_few_pictures_are_learned() -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "encoder_dim": 64, "decoder_dim": 64, "encoder_depth": 1, "decoder_depth": 1}
    tokenizer, images = TiTokTokenizer(16, 4, channels=4, **sizes), pictures(4)
    learn(tokenizer, images, 300, {"kl": 1e-5})
    error = (tokenizer.decode(tokenizer.encode(images)) - images).square().mean()
    assert error < 0.2 * images.var()  # the mean picture has 0.8


def teacher() -> MaskGITVQTokenizer:
    torch.manual_seed(5)
    return MaskGITVQTokenizer(16, VectorQuantizer(16, 8), width=8, mult=(1, 1, 2), blocks=1, groups=4)


def two_stage(**changes: object) -> TiTokTokenizer:
    pixels = CodeMixture(16, 8, width=8, mult=(1, 1, 2), blocks=1, groups=4)
    return TiTokTokenizer(**{"image_size": 16, "tokens": 4, "quantizer": codes(), "pixels": pixels, **SIZES, **changes})


def test_certain_logits_are_decoded_as_the_teacher_decodes_its_codes() -> None:
    taught = teacher()
    student = two_stage(teacher=taught)
    ids = torch.arange(16)[None]
    logits = 1e4 * torch.nn.functional.one_hot(ids, 16).float()
    assert_close(2 * student.decoder.pixels(logits, 4) - 1, taught.decode(ids))


def test_the_warm_up_learns_the_codes_of_the_teacher_and_leaves_it_alone() -> None:
    taught, images = teacher(), pictures(4)
    student = two_stage(teacher=taught)
    before = {name: tensor.clone() for name, tensor in taught.state_dict().items()}
    assert student.state_dict().keys() == two_stage().state_dict().keys()
    losses = learn(student, images, 40, {"proxy": 1.0, "codebook": 1.0, "commitment": 0.25})
    again, parts = student(images)
    assert again is None and parts["proxy"] < 0.7 * losses[0]
    assert_close(dict(taught.state_dict()), before, rtol=0, atol=0)
    assert_close(student.decoder.pixels.rows, taught.codebook(), rtol=0, atol=0)


def test_the_second_stage_starts_where_the_first_ended_and_moves_the_decoder_alone() -> None:
    images = pictures(4)
    first, second = two_stage(teacher=teacher()), two_stage(train_tokens=False)
    second.load_state_dict(first.state_dict())
    tokens = first.encode(images)
    losses = learn(second, images, 30, {})
    assert losses[-1] < 0.8 * losses[0] and second.encode(images).equal(tokens)
    moved = {
        name.split(".")[0] for name, tensor in second.state_dict().items() if not tensor.equal(first.state_dict()[name])
    }
    assert moved == {"decoder"} and not second.decoder.pixels.rows.equal(first.decoder.pixels.rows)
    assert second(images)[1].keys() == {"ids"}  # no losses of what rests


def test_a_teacher_that_does_not_fit_is_refused_naming_both() -> None:
    with pytest.raises(
        ValueError, match=r"names 16 codes on Grid\(t=1, h=8, w=8\), the teacher makes 16 on .*h=4, w=4"
    ):
        two_stage(image_size=32, teacher=teacher())
    with pytest.raises(ValueError, match="a teacher needs pixels"):
        two_stage(pixels=None, teacher=teacher())


def test_the_grid_of_the_codes_is_the_decoders() -> None:
    assert small(decoder_patch=8).grid == Grid(1, 2, 3)
