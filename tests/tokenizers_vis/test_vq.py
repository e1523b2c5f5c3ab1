"""The convolutional VQ autoencoder, and the published layout of LlamaGen's."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from layers.keymap import CheckpointMismatch
from layers.record import UnknownName, build
from layers.spec import Grid, TokenSpec
from tokenizers_vis import CLASSES, from_published
from tokenizers_vis.quantizers import LFQ, ResidualQuantizer, VectorQuantizer
from tokenizers_vis.vq import VQTokenizer

SMALL = {"channels": 8, "encoder_mult": (1, 2, 2), "res_blocks": 1, "groups": 4, "z_channels": 8}


def small(image_size: int | tuple[int, int] = (16, 24), **options: Any) -> VQTokenizer:
    """Every parameter random, none at its start value: biases, norms, codes spread out."""
    torch.manual_seed(0)
    tokenizer = VQTokenizer(image_size, VectorQuantizer(32, 4, normalize=True), **{**SMALL, **options}).eval()
    for parameter in tokenizer.parameters():
        nn.init.normal_(parameter, std=max(1, parameter[0].numel()) ** -0.5)
    return tokenizer


def pictures(count: int, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_tokens_lie_on_a_raster_of_the_picture() -> None:
    tokenizer = small()
    assert tokenizer.spec == TokenSpec(Grid(1, 4, 6), decoded=(1, 16, 24), vocab_size=32)
    assert tokenizer.prefixes == (24,)
    tokens = tokenizer.encode(pictures(2))
    assert tokens.shape == (2, 24)
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens).shape == (2, 3, 16, 24)


def test_raster_order_is_row_by_row() -> None:
    """Without attention a token depends on its surroundings alone: a change in the last row leaves the first as it was."""
    tokenizer = small((64, 24))
    for module in tokenizer.encoder.modules():
        if hasattr(module, "qkv"):
            module.out.weight.data.zero_()
    tokenizer = tokenizer.double()
    for norm in (module for module in tokenizer.modules() if isinstance(module, nn.GroupNorm)):
        norm.forward = nn.Identity().forward  # its statistics reach over the whole picture
    a = pictures(1, 64, 24).double()
    b = a.clone()
    b[:, :, -4:] *= -1
    z_a, z_b = (tokenizer(x)[1]["z"] for x in (a, b))  # (1, 16 * 6, D)
    changed = (z_a != z_b).any(-1).view(16, 6)
    assert not changed[:4].any()
    assert changed[-1].all()


def test_forward_is_encode_and_decode_with_terms_and_gradients() -> None:
    tokenizer = small().train()
    images = pictures(2)
    reconstruction, parts = tokenizer(images)
    assert parts.keys() == {"codebook", "commitment", "ids", "z", "stats"}
    assert torch.equal(parts["ids"], tokenizer.encode(images))
    assert torch.equal(reconstruction, tokenizer.decode(parts["ids"]))
    assert parts["z"].shape == (2, 24, 4)
    (reconstruction.square().mean() + parts["codebook"] + parts["commitment"]).backward()
    untouched = [name for name, parameter in tokenizer.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert untouched == []
    assert tokenizer.last_layer.grad.shape == (3, 8, 3, 3)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    tokenizer = small()
    images = pictures(5)
    tokens = tokenizer.encode(images)
    assert torch.equal(torch.cat([tokenizer.encode(image[None]) for image in images]), tokens)
    alone = torch.cat([tokenizer.decode(row[None]) for row in tokens])
    assert_close(tokenizer.decode(tokens), alone)


def test_memory_format_and_dtype_do_not_change_the_result() -> None:
    tokenizer = small()
    images = pictures(2)
    tokens = tokenizer.encode(images)
    decoded = tokenizer.decode(tokens)
    tokenizer.to(memory_format=torch.channels_last)
    assert torch.equal(tokenizer.encode(images.to(memory_format=torch.channels_last)), tokens)
    assert_close(tokenizer.decode(tokens), decoded)
    assert_close(tokenizer.double().decode(tokens).float(), decoded)
    half = tokenizer.bfloat16().decode(tokens)
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), decoded, atol=0.05, rtol=0.05)


def test_attention_is_softmax_over_all_cells() -> None:
    attention = small().encoder.middle[1].double()
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    q, k, v = attention.qkv(attention.norm(x)).flatten(2).chunk(3, dim=1)  # (B, C, cells)
    law = (torch.einsum("bci,bcj->bij", q, k) / 4).softmax(-1)
    seen = torch.einsum("bij,bcj->bci", law, v).view_as(x)
    assert_close(attention(x), x + attention.out(seen))


def test_codes_are_embeddings_of_tokens() -> None:
    tokenizer = small()
    tokens = torch.arange(32).view(2, 16)
    assert torch.equal(tokenizer.embed(tokens), tokenizer.codebook().view(2, 16, 4))


def test_a_record_builds_the_same_tokenizer() -> None:
    record = {
        "class_path": "VQTokenizer",
        "init_args": {
            "image_size": [16, 24],
            **{name: list(value) if isinstance(value, tuple) else value for name, value in SMALL.items()},
            "quantizer": {"class_path": "LFQ", "init_args": {"bits": 6}},
        },
    }
    tokenizer = build(record, CLASSES)
    assert tokenizer.spec == TokenSpec(Grid(1, 4, 6), decoded=(1, 16, 24), vocab_size=64)
    wanted = VQTokenizer((16, 24), LFQ(6), **SMALL)
    assert {k: v.shape for k, v in tokenizer.state_dict().items()} == {
        k: v.shape for k, v in wanted.state_dict().items()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (16, 30)}, "image_size 16 x 30 is not divisible by 4"),
        ({"groups": 3}, "8 channels are not divisible into groups=3"),
        ({"decoder_mult": (1, 2)}, "encoder_mult has 3 levels, decoder_mult 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_quantiser_of_several_ids_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="ResidualQuantizer gives 2 ids a vector"):
        VQTokenizer(16, ResidualQuantizer(lambda: LFQ(4), 2), **SMALL)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 16, 24), (3, 16, 24)])
def test_other_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"got images {re.escape(str(shape))}, made for \(B, 3, 16, 24\)"):
        small().encode(torch.zeros(shape))


def test_other_tokens_are_refused() -> None:
    tokenizer = small()
    tokens = torch.zeros(2, 24, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"got tokens \(2, 23\), decodes \(B, 24\)"):
        tokenizer.decode(tokens[:, 1:])
    for wrong in (-1, 32):
        with pytest.raises(ValueError, match=rf"ids from {min(wrong, 0)} to {max(wrong, 0)}, the codebook has 0 to 31"):
            tokenizer.decode(tokens.index_fill(1, torch.tensor([5]), wrong))
    with pytest.raises(ValueError, match="present must be None"):
        tokenizer.decode(tokens, present=torch.ones(2, 24, dtype=torch.bool))


# The published layout, written out from the original's shapes


def with_bias(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def res_keys(name: str, c_in: int, c_out: int) -> dict[str, tuple[int, ...]]:
    keys = with_bias(f"{name}.norm1", c_in) | with_bias(f"{name}.conv1", c_out, c_in, 3, 3)
    keys |= with_bias(f"{name}.norm2", c_out) | with_bias(f"{name}.conv2", c_out, c_out, 3, 3)
    return keys | (with_bias(f"{name}.nin_shortcut", c_out, c_in, 1, 1) if c_in != c_out else {})


def attn_keys(name: str, c: int) -> dict[str, tuple[int, ...]]:
    convs = [with_bias(f"{name}.{part}", c, c, 1, 1) for part in ("q", "k", "v", "proj_out")]
    return {key: shape for keys in [with_bias(f"{name}.norm", c), *convs] for key, shape in keys.items()}


def half_keys(side: str, widths: list[int], c_in: int, blocks: int, resample: str) -> dict[str, tuple[int, ...]]:
    """widths in the order the levels run."""
    keys, attended = {}, 0 if side == "decoder" else len(widths) - 1
    for i, c in enumerate(widths):
        for j in range(blocks):
            keys |= res_keys(f"{side}.conv_blocks.{i}.res.{j}", c if j else c_in, c)
            keys |= attn_keys(f"{side}.conv_blocks.{i}.attn.{j}", c) if i == attended else {}
        keys |= with_bias(f"{side}.conv_blocks.{i}.{resample}.conv", c, c, 3, 3) if i < len(widths) - 1 else {}
        c_in = c
    deep = widths[attended]
    keys |= res_keys(f"{side}.mid.0", deep, deep) | attn_keys(f"{side}.mid.1", deep)
    return keys | res_keys(f"{side}.mid.2", deep, deep) | with_bias(f"{side}.norm_out", widths[-1])


def published_shapes(
    mult: tuple[int, ...], ch: int = 128, blocks: int = 2, z: int = 256, vocab_size: int = 16384, dim: int = 8
) -> dict[str, tuple[int, ...]]:
    widths = [ch * m for m in mult]
    return {
        **with_bias("encoder.conv_in", ch, 3, 3, 3),
        **half_keys("encoder", widths, ch, blocks, "downsample"),
        **with_bias("encoder.conv_out", z, widths[-1], 3, 3),
        **with_bias("decoder.conv_in", widths[-1], z, 3, 3),
        **half_keys("decoder", widths[::-1], widths[-1], blocks + 1, "upsample"),
        **with_bias("decoder.conv_out", 3, ch, 3, 3),
        **with_bias("quant_conv", dim, z, 1, 1),
        **with_bias("post_quant_conv", z, dim, 1, 1),
        "quantize.embedding.weight": (vocab_size, dim),
        "quantize.codebook_used": (65536,),
    }


def zeros(shapes: Mapping[str, tuple[int, ...]], device: str = "cpu") -> dict[str, Tensor]:
    return {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}


@pytest.mark.parametrize(("mult", "parameters"), [((1, 1, 2, 2, 4), 71_883_403), ((1, 2, 2, 4), 70_109_835)])
def test_the_published_sizes_load_whole(mult: tuple[int, ...], parameters: int) -> None:
    state = zeros(published_shapes(mult), device="meta")
    tokenizer = from_published("llamagen-vq", state, {"encoder_ch_mult": mult, "decoder_ch_mult": mult})
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == parameters
    side = 256 // 2 ** (len(mult) - 1)
    assert tokenizer.spec == TokenSpec(Grid(1, side, side), decoded=(1, 256, 256), vocab_size=16384)
    assert not tokenizer.training


TINY = {"mult": (1, 2), "ch": 4, "blocks": 1, "z": 4, "vocab_size": 8, "dim": 2}
TINY_CONFIG = {
    "encoder_ch_mult": [1, 2],
    "decoder_ch_mult": [1, 2],
    "ch": 4,
    "num_res_blocks": 1,
    "num_groups": 2,
    "z_channels": 4,
    "codebook_size": 8,
    "codebook_embed_dim": 2,
    "image_size": 8,
}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            lambda s: s.pop("encoder.mid.1.k.bias"),
            r"encoder\.middle\.1\.qkv\.bias needs 3 parts",
        ),
        (lambda s: s.pop("decoder.conv_out.weight"), r"decoder\.out\.weight is not in the checkpoint"),
        (lambda s: s.update(extra=torch.zeros(3)), r"extra \(3,\) fits 0 rules"),
        (
            lambda s: s.update({"quantize.embedding.weight": torch.zeros(9, 2)}),
            r"quantizer\.rows is \(9, 2\), the model has \(8, 2\)",
        ),
    ],
)
def test_a_key_that_does_not_fit_is_named(change: Any, fault: str) -> None:
    state = zeros(published_shapes(**TINY))
    from_published("llamagen-vq", state, TINY_CONFIG)
    change(state)
    with pytest.raises(CheckpointMismatch, match=fault):
        from_published("llamagen-vq", state, TINY_CONFIG)


def test_the_usage_buffer_may_be_missing() -> None:
    state = zeros(published_shapes(**TINY))
    del state["quantize.codebook_used"]
    from_published("llamagen-vq", state, TINY_CONFIG)


def test_names_that_do_not_exist_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="'llamagen_vq' is not known; did you mean 'llamagen-vq'"):
        from_published("llamagen_vq", {}, {})
    with pytest.raises(UnknownName, match="config key 'z_channel' is not known; did you mean 'z_channels'"):
        from_published("llamagen-vq", {}, {"z_channel": 4})
