"""The TiTok entries of the registry: original layouts, numbers of parameters, pictures from a generator's tokens."""

from copy import deepcopy
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import generators
import tokenizers_vis
from layers.checkpoint import save_tensors
from layers.keymap import CheckpointMismatch
from layers.noise import Noise
from layers.record import UnknownName
from layers.spec import Condition, Sequence
from sampling.decode import generate
from sampling.sampler import Sampler
from tokenizers_vis.titok import SIZES, TITOK_KEYS, TiTokTokenizer
from training import published
from training.published import Entry, check, entries, load_published

Shapes = dict[str, tuple[int, ...]]
KNOWN = entries()
NAMES = [name for name, entry in KNOWN.items() if entry.family == "titok"]
TINY = {"tiny": {"width": 32, "layers": 2, "heads": 2}}
SMALL_PIXELS = {
    "channel_mult": [1, 1, 2],
    "num_resolutions": 3,
    "hidden_channels": 32,
    "num_res_blocks": 1,
    "z_channels": 8,
}


# ---- the original layouts, written out


def layout(config: dict[str, Any]) -> Shapes:
    """Keys and shapes of the original state dict, of a TA-TiTok where the text's sizes are given."""
    options, side = config["model"]["vq_model"], config["dataset"]["preprocessing"]["crop_size"]
    sizes = SIZES | config.get("size_table", {})
    tokens, channels = options["num_latent_tokens"], options["token_size"]
    vae, legacy = options.get("quantize_mode") == "vae", options.get("is_legacy", True)
    shapes: Shapes = {}
    for name in ("encoder", "decoder"):
        size, patch = sizes[options[f"vit_{name[:3]}_model_size"]], options[f"vit_{name[:3]}_patch_size"]
        shapes |= transformer(name, size["width"], size["layers"], (side // patch) ** 2, tokens)
    d, p = sizes[options["vit_enc_model_size"]]["width"], options["vit_enc_patch_size"]
    shapes |= {"latent_tokens": (tokens, d), **pair("encoder.patch_embed", d, 3, p, p)}
    shapes |= pair("encoder.conv_out", channels * (2 if vae else 1), d, 1, 1)
    if not vae:
        shapes["quantize.embedding.weight"] = (options["codebook_size"], channels)
    d, p = sizes[options["vit_dec_model_size"]]["width"], options["vit_dec_patch_size"]
    shapes |= {"decoder.mask_token": (1, 1, d), **pair("decoder.decoder_embed", d, channels)}
    if "text_embed_dim" in options:
        shapes |= pair("decoder.text_guidance_proj", d, options["text_embed_dim"])
        shapes["decoder.text_guidance_positional_embedding"] = (options["text_context_length"], d)
    if not legacy:
        return shapes | pair("decoder.ffn.0", 3 * p * p, d, 1, 1) | pair("decoder.conv_out", 3, 3, 3, 3)
    codes = options.get("pixel_codebook", 1024)
    shapes |= pair("decoder.ffn.0", 2 * d, d, 1, 1) | pair("decoder.ffn.2", codes, 2 * d, 1, 1)
    return shapes | pixel_decoder(options.get("pixel_cfg", {}), codes)


def transformer(side: str, d: int, depth: int, patches: int, tokens: int) -> Shapes:
    shapes = {
        f"{side}.class_embedding": (1, d),
        f"{side}.positional_embedding": (patches + 1, d),
        f"{side}.latent_token_positional_embedding": (tokens, d),
        **pair(f"{side}.ln_pre", d),
        **pair(f"{side}.ln_post", d),
    }
    for i in range(depth):
        block = f"{side}.transformer.{i}"
        shapes |= pair(f"{block}.ln_1", d) | pair(f"{block}.ln_2", d) | pair(f"{block}.attn.out_proj", d, d)
        shapes |= {f"{block}.attn.in_proj_weight": (3 * d, d), f"{block}.attn.in_proj_bias": (3 * d,)}
        shapes |= pair(f"{block}.mlp.c_fc", 4 * d, d) | pair(f"{block}.mlp.c_proj", d, 4 * d)
    return shapes


def pixel_decoder(config: dict[str, Any], codes: int) -> Shapes:
    ch, blocks, z = config.get("hidden_channels", 128), config.get("num_res_blocks", 2), config.get("z_channels", 256)
    widths = [ch * m for m in config.get("channel_mult", (1, 1, 2, 2, 4))]
    top = widths[-1]
    shapes = {"pixel_quantize.embedding.weight": (codes, z), **pair("pixel_decoder.conv_in", top, z, 3, 3)}
    for j in range(blocks):
        shapes |= res(f"pixel_decoder.mid.{j}", top, top)
    for i, before in zip(reversed(range(len(widths))), (top, *reversed(widths)), strict=False):
        for j in range(blocks):
            shapes |= res(f"pixel_decoder.up.{i}.block.{j}", widths[i] if j else before, widths[i])
        if i:
            shapes |= pair(f"pixel_decoder.up.{i}.upsample_conv", widths[i], widths[i], 3, 3)
    return shapes | pair("pixel_decoder.norm_out", widths[0]) | pair("pixel_decoder.conv_out", 3, widths[0], 3, 3)


def res(name: str, c_in: int, c_out: int) -> Shapes:
    shapes = pair(f"{name}.norm1", c_in) | pair(f"{name}.norm2", c_out)
    shapes |= {f"{name}.conv1.weight": (c_out, c_in, 3, 3), f"{name}.conv2.weight": (c_out, c_out, 3, 3)}
    return shapes | ({f"{name}.nin_shortcut.weight": (c_out, c_out, 1, 1)} if c_in != c_out else {})


def pair(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def hollow(shapes: Shapes) -> dict[str, Tensor]:
    """Zeros of full shape that take no memory."""
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


def drawn(shapes: Shapes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: 0.2 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def small(name: str) -> dict[str, Any]:
    options = deepcopy(KNOWN[name].config["model"]["vq_model"])
    options |= {"vit_enc_model_size": "tiny", "vit_dec_model_size": "tiny", "vit_enc_patch_size": 4}
    options |= {"vit_dec_patch_size": 4, "num_latent_tokens": 6, "codebook_size": 20}
    if options.get("is_legacy", True):
        options |= {"pixel_codebook": 12, "pixel_cfg": SMALL_PIXELS}
    return {"model": {"vq_model": options}, "dataset": {"preprocessing": {"crop_size": 16}}, "size_table": TINY}


def build(config: dict[str, Any], state: dict[str, Tensor]) -> TiTokTokenizer:
    return tokenizers_vis.from_published("titok", state, config)


# ---- the registry


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_takes_the_original_layout_and_has_the_published_number_of_parameters(name: str) -> None:
    entry = KNOWN[name]
    options, shapes = entry.config["model"]["vq_model"], layout(entry.config)
    tokenizer = build(entry.config, hollow(shapes))
    count = sum(prod(parameter.shape) for parameter in tokenizer.parameters()) / 1e6
    assert abs(count - entry.parameters) < 0.06 and count == sum(map(prod, shapes.values())) / 1e6
    spec = tokenizer.spec
    assert spec.layout == Sequence(options["num_latent_tokens"]) and spec.decoded == (1, 256, 256)
    assert (spec.vocab_size, spec.channels) == ((None, 16) if "vae" in name else (options["codebook_size"], None))


@pytest.mark.parametrize("name", [f"titok-{size}" for size in ("l32", "b64", "s128")])
def test_a_generator_names_the_tokenizer_that_makes_its_tokens(name: str) -> None:
    generator = KNOWN[f"{name}-maskgit"]
    assert generator.tokenizer == name
    model, vocab = generator.config["model"], KNOWN[name].config["model"]["vq_model"]
    assert model["generator"]["image_seq_len"] == vocab["num_latent_tokens"]
    assert model["vq_model"]["codebook_size"] == vocab["codebook_size"]


@pytest.mark.parametrize("name", ["titok-b64", "titok-bl64-vq8k", "tatitok-bl32-vae"])
def test_every_key_is_needed_and_none_may_be_left_over(name: str) -> None:
    config = small(name)
    state = hollow(layout(config))
    build(config, state)
    for key in [key for key in state if "text_guidance" not in key][::9]:
        with pytest.raises(CheckpointMismatch, match="not in the checkpoint"):
            build(config, {other: tensor for other, tensor in state.items() if other != key})
    with pytest.raises(CheckpointMismatch, match="pixel_encoder"):
        build(config, state | {"pixel_encoder.conv_in.weight": torch.zeros(1)})


def test_the_use_of_codes_is_ignored_for_a_reason() -> None:
    config = small("tatitok-bl32-vq")
    build(config, hollow(layout(config)) | {"quantize.embed_prob": torch.zeros(20)})
    ignored = {key for key, target in TITOK_KEYS.items() if target is None}
    assert all(ignored == set(KNOWN[name].ignored) for name in NAMES)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"finetune_decoder": False}, ValueError, "A file of the first stage"),
        ({"quantize_mode": "vae"}, ValueError, "finetune_decoder is True"),
        ({"quantize_mode": "fsq"}, UnknownName, "quantize_mode 'fsq' is not known"),
        ({"vit_enc_model_size": "huge"}, UnknownName, "size 'huge'"),
        ({"num_latent_token": 3}, UnknownName, "did you mean 'num_latent_tokens'"),
        ({"pixel_cfg": {"channel_mult": [1, 2]}}, ValueError, r"num_resolutions 5 must count channel_mult \[1, 2\]"),
    ],
)
def test_options_that_make_no_tokenizer_are_refused(options: dict[str, Any], error: type[Exception], said: str) -> None:
    config = deepcopy(KNOWN["titok-b64"].config)
    config["model"]["vq_model"] |= options
    with pytest.raises(error, match=said):
        build(config, {})


def test_old_configurations_leave_the_two_stages_out() -> None:
    config = small("titok-b64")
    state, options = drawn(layout(config)), config["model"]["vq_model"]
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    stated = build(config, state)
    for name in ("finetune_decoder", "is_legacy"):
        options.pop(name, None)
    silent = build(config, state)
    assert silent.encode(images).equal(stated.encode(images)) and silent.encoder.legacy_layout


# ---- from files to pictures


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Entry]:
    """A small generator and its tokenizer in place of the published ones, under their names."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"condition_num_classes": 5, "image_seq_len": 6}
    generator = KNOWN["titok-b64-maskgit"]
    config = {"model": {"vq_model": {"codebook_size": 20}, "generator": generator.config["model"]["generator"] | sizes}}
    config["dataset"] = {"preprocessing": {"crop_size": 16}}
    changed = KNOWN | {
        "titok-b64": replace(KNOWN["titok-b64"], config=small("titok-b64")),
        "titok-b64-maskgit": replace(generator, config=config),
    }
    monkeypatch.setattr(published, "entries", lambda: changed)
    return changed


def bert_layout(config: dict[str, Any]) -> Shapes:
    sizes, vocab = config["model"]["generator"], config["model"]["vq_model"]["codebook_size"]
    d, f = sizes["hidden_size"], sizes["intermediate_size"]
    shapes = {
        "model.embeddings.word_embeddings.weight": (vocab + sizes["condition_num_classes"] + 2, d),
        "model.embeddings.position_embeddings.weight": (sizes["image_seq_len"] + 1, d),
        "model.embeddings.token_type_embeddings.weight": (2, d),
        **pair("model.embeddings.LayerNorm", d),
        **pair("model.lm_head", vocab, d),
    }
    for i in range(sizes["num_hidden_layers"]):
        layer = f"model.encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= pair(f"{layer}.attention.{name}", d, d)
        shapes |= pair(f"{layer}.attention.output.LayerNorm", d) | pair(f"{layer}.output.LayerNorm", d)
        shapes |= pair(f"{layer}.intermediate.dense", f, d) | pair(f"{layer}.output.dense", d, f)
    return shapes


def test_a_published_generator_and_its_tokenizer_make_pictures(tmp_path: Path, registry: dict[str, Entry]) -> None:
    paths = tmp_path / "generator.safetensors", tmp_path / "tokenizer.safetensors"
    save_tensors(paths[0], drawn(bert_layout(registry["titok-b64-maskgit"].config)))
    save_tensors(paths[1], drawn(layout(registry["titok-b64"].config)))
    assert check(paths[1], "titok-b64").fits == ("titok-b64",)
    found = load_published("titok-b64-maskgit", *paths)
    assert isinstance(found.generator, generators.masked.Masked) and found.generator.spec == found.tokenizer.spec
    assert found.provenance["tokenizer"]["published"] == "titok-b64"
    sampler = Sampler.from_values({"filter": {}, "greedy": False, **found.recipe})
    with torch.inference_mode():
        noise = Noise(0, torch.arange(3))
        tokens = generate(found.generator, Condition(label=torch.tensor([0, 3, 4])), sampler, noise).tokens
        images = found.tokenizer.decode(tokens)
    assert tokens.shape == (3, 6) and images.shape == (3, 3, 16, 16)
    assert images.isfinite().all() and (images[0] - images[1]).abs().max() > 1e-3
