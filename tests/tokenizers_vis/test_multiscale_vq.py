"""The multi-scale residual VQ autoencoder, and the published layout of VAR's."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from layers.keymap import CheckpointMismatch
from layers.record import UnknownName, build
from layers.spec import Pyramid, TokenSpec
from tokenizers_vis import CLASSES, from_published
from tokenizers_vis.multiscale_vq import DirectionQuantizer, MultiScaleVQTokenizer
from tokenizers_vis.quantizers import (
    FSQ,
    LFQ,
    EMAVectorQuantizer,
    Quantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)

SCALES = (1, (1, 2), (2, 3), (4, 6))
LENGTHS, PREFIXES = (1, 2, 6, 24), (1, 3, 9, 33)
SMALL = {"channels": 8, "mult": (1, 2, 2), "res_blocks": 1, "groups": 4}


def small(quantizer: Quantizer | None = None, **options: Any) -> MultiScaleVQTokenizer:
    """Every parameter random, none at its start value: biases, norms, codes spread out."""
    torch.manual_seed(0)
    made = MultiScaleVQTokenizer(SCALES, quantizer or VectorQuantizer(32, 4), **{**SMALL, **options}).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=max(1, parameter[0].numel()) ** -0.5)
    return made


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_tokens_are_a_pyramid_and_every_prefix_of_scales_decodes() -> None:
    made = small()
    sizes = ((1, 1), (1, 2), (2, 3), (4, 6))
    assert made.spec == TokenSpec(Pyramid(sizes), decoded=(1, 16, 24), vocab_size=32)
    assert made.prefixes == PREFIXES
    tokens = made.encode(pictures(2))
    assert tokens.shape == (2, 33)
    assert tokens.dtype == torch.int64
    for n in PREFIXES:
        f = torch.stack(list(made.scales.sums(made.embed(tokens[:, :n]))))[-1]
        assert torch.equal(made.decode(tokens[:, :n]), made.pixels(f))


def test_a_scale_is_the_nearest_code_to_what_the_scales_before_left() -> None:
    made = small().double()
    images = pictures(2).double()
    f = made.to_code(made.encoder(images))
    tokens = made.encode(images)
    total = torch.zeros_like(f)
    for k, part in enumerate(tokens.split(LENGTHS, dim=1)):
        left = F.adaptive_avg_pool2d(f - total, made.scales.sizes[k]).flatten(2).transpose(1, 2)
        assert torch.equal(torch.cdist(left, made.codebook()[None]).argmin(-1), part)
        total = total + made.scales.spread(made.embed(part), k)


def test_forward_is_encode_and_decode_with_terms_and_gradients() -> None:
    made = small()
    images = pictures(2)
    reconstruction, parts = made(images)
    stats = {f"perplexity_scale_{k}" for k in range(4)}
    assert parts.keys() == {"codebook", "commitment", "ids", "stats"}
    assert parts["stats"].keys() == stats
    assert torch.equal(parts["ids"], made.encode(images))
    assert torch.equal(reconstruction, made.decode(parts["ids"]))
    (reconstruction.square().mean() + parts["codebook"] + parts["commitment"]).backward()
    untouched = [name for name, parameter in made.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert untouched == []
    assert made.last_layer.grad.shape == (3, 8, 3, 3)


def test_the_terms_compare_the_latent_with_the_sum_after_every_scale() -> None:
    made = small()
    images = pictures(2)
    _, parts = made(images)
    f = made.to_code(made.encoder(images))
    f.retain_grad()
    sums = list(made.scales.sums(made.embed(parts["ids"])))
    wanted = torch.stack([F.mse_loss(total, f) for total in sums]).mean()
    assert_close(parts["codebook"], wanted)
    assert_close(parts["commitment"], wanted)
    (codes,) = torch.autograd.grad(parts["codebook"], made.quantizer.rows, retain_graph=True)
    assert_close(codes, torch.autograd.grad(wanted, made.quantizer.rows, retain_graph=True)[0])
    assert torch.autograd.grad(parts["codebook"], made.to_code.weight, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(parts["commitment"], made.quantizer.rows, allow_unused=True) == (None,)


def test_the_pictures_gradient_goes_straight_through_to_the_latent() -> None:
    made = small()
    images = pictures(2)
    reconstruction, parts = made(images)
    (through,) = torch.autograd.grad(reconstruction.sum(), made.to_code.bias)
    *_, total = made.scales.sums(made.embed(parts["ids"]))
    total = total.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(made.pixels(total).sum(), total)
    assert_close(through, wanted.sum((0, 2, 3)))


def test_dropped_scales_decode_a_prefix_of_every_length_equally_often() -> None:
    made = small(drop_scales=0.8)
    sums = torch.arange(4.0)[:, None].expand(4, 4000)[..., None, None, None]
    assert torch.equal(made._last_sum(sums), sums[-1])  # in eval mode never
    torch.manual_seed(0)
    share = made.train()._last_sum(sums).flatten().long().bincount(minlength=4) / 4000
    wanted = torch.tensor([0.2, 0.2, 0.2, 0.4])  # a standard error is below 0.008: 5 of them
    assert_close(share, wanted, atol=0.04, rtol=0)


@pytest.mark.parametrize(
    "quantizer",
    [
        VectorQuantizer(32, 4, normalize=True, revive_below=0.5, usage_decay=0.5),
        DirectionQuantizer(32, 4),
        EMAVectorQuantizer(32, 4, revive_below=0.5),
        SimVQ(32, 4),
        FSQ((4, 4, 3, 3)),
        LFQ(4),
    ],
    ids=lambda quantizer: type(quantizer).__name__,
)
def test_any_quantiser_of_one_id_trains_encodes_and_reads(quantizer: Quantizer) -> None:
    made = small(quantizer).train()
    reconstruction, parts = made(pictures(4))
    assert torch.equal(reconstruction, made.decode(parts["ids"]))  # the codes as they are after they moved
    (reconstruction.square().mean() + parts["codebook"] + parts["commitment"]).backward()
    made.eval()
    tokens = made.encode(pictures(4))
    reader = made.reader()
    memory, start = reader.begin(4), 0
    for k, part in enumerate(tokens.split(LENGTHS, dim=1)):
        memory, _ = reader.read(memory, part, k)
        assert_close(made.pixels(memory), made.decode(tokens[:, : start + part.shape[1]]))
        start += part.shape[1]


def test_the_codebook_learns_from_every_scale_alike() -> None:
    made = small()
    z = torch.repeat_interleave(torch.arange(4.0), torch.tensor(LENGTHS)).expand(5, -1)[..., None] + torch.zeros(4)
    seen = made._evenly(z)
    assert torch.equal(seen[:, 0].long().bincount(minlength=4), torch.full((4,), 42))  # ceil(5 * 33 / 4)
    z = torch.randn(5, 33, 4)
    first = made._evenly(z)[:42]  # five vectors, each eight or nine times
    rows, counts = first.unique(dim=0, return_counts=True)
    assert torch.equal(rows, z[:, 0].unique(dim=0))
    assert set(counts.tolist()) == {8, 9}


def test_the_reader_is_a_frozen_copy() -> None:
    made = small(phi_ratio=0.3, phis=2)
    reader = made.reader()
    tokens = made.encode(pictures(2))
    before = reader(tokens)
    for parameter in made.parameters():
        parameter.data.add_(1)
    assert torch.equal(reader(tokens), before)
    assert not any(parameter.requires_grad for parameter in reader.parameters())
    assert reader.record()["init_args"] == {
        "sizes": [[1, 1], [1, 2], [2, 3], [4, 6]],
        "vocab_size": 32,
        "channels": 4,
        "phis": 2,
        "ratio": 0.3,
    }


def test_the_direction_decides_and_the_length_is_kept() -> None:
    quantizer = DirectionQuantizer(2, 2)
    quantizer.rows.data = torch.tensor([[3.0, 0.0], [0.1, 0.1]])
    z = torch.tensor([[0.2, 0.01], [2.0, 1.9]])
    assert quantizer.assign(z).tolist() == [0, 1]  # the nearest row would be 1, then 0
    assert torch.equal(quantizer(z).z_q, quantizer.rows)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    made = small()
    images = pictures(5)
    tokens = made.encode(images)
    assert torch.equal(torch.cat([made.encode(image[None]) for image in images]), tokens)
    assert_close(made.decode(tokens), torch.cat([made.decode(row[None]) for row in tokens]))


def test_half_precision_quantises_in_float32() -> None:
    made = small()
    images = pictures(2)
    tokens = made.encode(images)
    decoded = made.decode(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reconstruction, parts = made(images)
        assert parts["codebook"].dtype == torch.float32
        assert torch.equal(reconstruction, made.decode(parts["ids"]))
    half = made.bfloat16().decode(tokens)
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), decoded, atol=0.05, rtol=0.05)


def test_a_record_builds_the_same_tokenizer() -> None:
    record = {
        "class_path": "MultiScaleVQTokenizer",
        "init_args": {
            "scales": [1, [1, 2], [2, 3], [4, 6]],
            "quantizer": {"class_path": "VectorQuantizer", "init_args": {"vocab_size": 32, "dim": 4}},
            **{name: list(value) if isinstance(value, tuple) else value for name, value in SMALL.items()},
        },
    }
    made, wanted = build(record, CLASSES), small()
    assert made.spec == wanted.spec
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in wanted.state_dict().items()}


def test_what_does_not_fit_is_refused() -> None:
    made = small()
    tokens = torch.zeros(2, 33, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"ResidualQuantizer gives 2 ids a vector"):
        small(ResidualQuantizer(lambda: LFQ(4), 2))
    with pytest.raises(ValueError, match=r"\(5, 5\) is larger than the last scale \(4, 4\)"):
        MultiScaleVQTokenizer((1, 5, 4), VectorQuantizer(32, 4), **SMALL)
    with pytest.raises(ValueError, match=re.escape("got images (2, 3, 16, 16), made for (B, 3, 16, 24)")):
        made.encode(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match=re.escape("got tokens (2, 5), decodes (B, n), n one of (1, 3, 9, 33)")):
        made.decode(tokens[:, :5])
    for wrong in (-1, 32):
        with pytest.raises(ValueError, match=rf"ids from {min(wrong, 0)} to {max(wrong, 0)}, the codebook has 0 to 31"):
            made.decode(tokens.index_fill(1, torch.tensor([5]), wrong))
    with pytest.raises(ValueError, match="present must be None"):
        made.decode(tokens, present=torch.ones(2, 33, dtype=torch.bool))


# The published layout, written out from the original's shapes


def with_bias(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def res_keys(name: str, c_in: int, c_out: int) -> dict[str, tuple[int, ...]]:
    keys = with_bias(f"{name}.norm1", c_in) | with_bias(f"{name}.conv1", c_out, c_in, 3, 3)
    keys |= with_bias(f"{name}.norm2", c_out) | with_bias(f"{name}.conv2", c_out, c_out, 3, 3)
    return keys | (with_bias(f"{name}.nin_shortcut", c_out, c_in, 1, 1) if c_in != c_out else {})


def attn_keys(name: str, c: int) -> dict[str, tuple[int, ...]]:
    keys = with_bias(f"{name}.norm", c) | with_bias(f"{name}.qkv", 3 * c, c, 1, 1)
    return keys | with_bias(f"{name}.proj_out", c, c, 1, 1)


def half_keys(side: str, levels: str, resample: str, widths: list[int], blocks: int) -> dict[str, tuple[int, ...]]:
    """widths: of the levels in the order they run, numbered up in the encoder, down in the decoder."""
    last, keys = len(widths) - 1, {}
    deep = widths[0] if side == "decoder" else widths[-1]
    c_in = deep if side == "decoder" else widths[0]
    for step, c in enumerate(widths):
        number = last - step if side == "decoder" else step
        for j in range(blocks):
            keys |= res_keys(f"{side}.{levels}.{number}.block.{j}", c if j else c_in, c)
            keys |= attn_keys(f"{side}.{levels}.{number}.attn.{j}", c) if number == last else {}
        keys |= with_bias(f"{side}.{levels}.{number}.{resample}.conv", c, c, 3, 3) if step < last else {}
        c_in = c
    keys |= res_keys(f"{side}.mid.block_1", deep, deep) | attn_keys(f"{side}.mid.attn_1", deep)
    return keys | res_keys(f"{side}.mid.block_2", deep, deep) | with_bias(f"{side}.norm_out", widths[-1])


def published_shapes(
    ch: int = 160, mult: tuple[int, ...] = (1, 1, 2, 2, 4), z: int = 32, vocab_size: int = 4096, phi: str = "some"
) -> dict[str, tuple[int, ...]]:
    """phi: one for all scales, some that are shared, or one each of the ten scales."""
    widths = [ch * m for m in mult]
    names = {"one": ["qresi"], "some": [f"qresi_ls.{j}" for j in range(4)], "each": [str(j) for j in range(10)]}[phi]
    phis = [with_bias(f"quantize.quant_resi.{name}", z, z, 3, 3) for name in names]
    return {
        **with_bias("encoder.conv_in", ch, 3, 3, 3),
        **half_keys("encoder", "down", "downsample", widths, 2),
        **with_bias("encoder.conv_out", z, widths[-1], 3, 3),
        **with_bias("decoder.conv_in", widths[-1], z, 3, 3),
        **half_keys("decoder", "up", "upsample", widths[::-1], 3),
        **with_bias("decoder.conv_out", 3, ch, 3, 3),
        **with_bias("quant_conv", z, z, 3, 3),
        **with_bias("post_quant_conv", z, z, 3, 3),
        **{key: shape for keys in phis for key, shape in keys.items()},
        "quantize.embedding.weight": (vocab_size, z),
        "quantize.ema_vocab_hit_SV": (10, vocab_size),
    }


def zeros(shapes: Mapping[str, tuple[int, ...]], device: str = "cpu") -> dict[str, Tensor]:
    return {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("scales", "side", "length"),
    [
        ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 256, 680),
        ((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), 512, 2240),
        ((1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64), 1024, 9451),
    ],
)
def test_the_published_file_loads_whole_for_every_size_of_picture(
    scales: tuple[int, ...], side: int, length: int
) -> None:
    state = zeros(published_shapes(), device="meta")
    assert len(state) == 324
    made = from_published("var-vqvae", state, {"ch": 160, "v_patch_nums": scales})
    assert sum(parameter.numel() for parameter in made.parameters()) == 108_948_355
    assert made.spec == TokenSpec(Pyramid(tuple((p, p) for p in scales)), decoded=(1, side, side), vocab_size=4096)
    assert made.spec.length == length
    assert not made.training


TINY = {"ch": 4, "mult": (1, 2), "z": 4, "vocab_size": 8}
TINY_CONFIG = {"ch": 4, "ch_mult": (1, 2), "z_channels": 4, "vocab_size": 8, "num_groups": 2}


@pytest.mark.parametrize(
    ("phi", "config", "count"),
    [
        ("some", {}, 4),
        ("one", {"share_quant_resi": 1}, 1),
        ("each", {"share_quant_resi": 0}, 10),
        ("each", {"share_quant_resi": 0, "default_qresi_counts": 10, "v_patch_nums": (1, 2, 3)}, 10),
    ],
)
def test_every_way_of_sharing_phi_loads(phi: str, config: dict[str, Any], count: int) -> None:
    state = zeros(published_shapes(**TINY, phi=phi))
    made = from_published("var-vqvae", state, {**TINY_CONFIG, **config})
    assert len(made.scales.phi) == count


def test_codes_are_chosen_by_direction_where_the_original_normalised() -> None:
    made = from_published("var-vqvae", zeros(published_shapes(**TINY)), {**TINY_CONFIG, "using_znorm": True})
    assert isinstance(made.quantizer, DirectionQuantizer)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda s: s.pop("decoder.up.1.attn.2.qkv.bias"), r"decoder\.levels\.0\.attn\.2\.qkv\.bias is not in the"),
        (lambda s: s.pop("quantize.quant_resi.qresi_ls.3.weight"), r"scales\.phi\.3\.weight is not in the checkpoint"),
        (lambda s: s.update(extra=torch.zeros(3)), r"extra \(3,\) fits 0 rules"),
        (
            lambda s: s.update({"quantize.embedding.weight": torch.zeros(9, 4)}),
            r"quantizer\.rows is \(9, 4\), the model has \(8, 4\)",
        ),
    ],
)
def test_a_key_that_does_not_fit_is_named(change: Any, fault: str) -> None:
    state = zeros(published_shapes(**TINY))
    change(state)
    with pytest.raises(CheckpointMismatch, match=fault):
        from_published("var-vqvae", state, TINY_CONFIG)


def test_names_that_do_not_exist_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="config key 'z_channel' is not known; did you mean 'z_channels'"):
        from_published("var-vqvae", {}, {"z_channel": 4})
