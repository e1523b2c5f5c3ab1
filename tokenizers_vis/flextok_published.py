"""FlexTok's published files: their names for tensors, and the numbers of the config.json beside them.

That file lists modules by class path and how they hand values to each other; the original program builds them from it. Here
it is data: the numbers in READ are taken, what is in WIRED must be as this project has it, nothing is built by name. What
only moves memory or speed, and the training options for noise on tokens, is read over.
"""

import ast
import re
from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from einops import rearrange
from safetensors import safe_open
from torch import Tensor

from layers.keymap import Join, Target, translate
from layers.record import look_up
from tokenizers_vis.flextok import FlexTokTokenizer
from tokenizers_vis.kl import KLTokenizer
from tokenizers_vis.quantizers import FSQ


def _table(places: Tensor) -> Tensor:
    """(1, D, h, w) -> (h, w, D)."""
    return rearrange(places, "1 d h w -> h w d")


def _line(places: Tensor) -> Tensor:
    """(1, 1, D, K) -> (K, D)."""
    return rearrange(places, "1 1 d k -> k d")


def _both(theirs: str, ours: str) -> dict[str, Target]:
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}


def _blocks(theirs: str, ours: str) -> dict[str, Target]:
    theirs, ours = f"{theirs}.blocks.{{i}}", f"{ours}.blocks.{{i}}"
    return {
        **{
            f"{theirs}.attn.{name}.weight": Join(f"{ours}.attention.qkv.weight", part, 3)
            for part, name in enumerate(("wq", "wk", "wv"))
        },
        f"{theirs}.attn.proj.weight": f"{ours}.attention.out.weight",
        f"{theirs}.mlp.fc1.weight": Join(f"{ours}.mlp.fc1.weight", 0, 2),
        f"{theirs}.mlp.fc3.weight": Join(f"{ours}.mlp.fc1.weight", 1, 2),
        f"{theirs}.mlp.fc2.weight": f"{ours}.mlp.fc2.weight",
    }


ENCODER, DECODER = "encoder.module_dict.enc", "decoder.module_dict.dec"
FLEXTOK_KEYS: dict[str, Target] = {
    **_both(f"{ENCODER}_patch_emb.patch_proj", "encoder.patches.project"),
    f"{ENCODER}_posemb_module.posembs": ("encoder.patches.places", _table),
    f"{ENCODER}_register_module.registers": "encoder.registers",
    **_blocks(f"{ENCODER}_transformer", "encoder"),
    **_both(f"{ENCODER}_to_latents.proj", "encoder.readout"),
    **_both(f"{DECODER}_from_latents.proj", "decoder.codes"),
    f"{DECODER}_registers_posemb_module.posembs": ("decoder.places", _line),
    f"{DECODER}_nested_dropout.dropout_mask_token": "decoder.dropped",
    f"{DECODER}_latent_dropout.nullcond": "decoder.null",
    **_both(f"{DECODER}_noise_patch_emb.patch_proj", "decoder.patches.project"),
    f"{DECODER}_patches_posemb_module.posembs": ("decoder.patches.places", _table),
    **_both(f"{DECODER}_time_embedder.mlp.0", "decoder.embed_time.0"),
    **_both(f"{DECODER}_time_embedder.mlp.2", "decoder.embed_time.2"),
    **_blocks(f"{DECODER}_transformer", "decoder"),
    **_both(f"{DECODER}_transformer.blocks.{{i}}.adaLN_modulation.1", "decoder.blocks.{i}.modulation.project"),
    **_both(f"{DECODER}_to_patches.adaLN_modulation.1", "decoder.modulation.project"),
    **_both(f"{DECODER}_to_patches.proj", "decoder.readout"),
    "vae.logvar": None,  # the weight of the autoencoder's own training loss
}

FLEXTOK_CONFIG: dict[str, Any] = {  # the numbers of config.json by short names, and the published values
    "enc_dim": 768,
    "enc_depth": 12,
    "dec_dim": 768,
    "dec_depth": 12,
    "head_dim": 64,
    "patch_size": 2,
    "grid": 16,
    "num_registers": 256,
    "latent_channels": 16,
    "fsq_levels": (8, 8, 8, 5, 5, 5),
    "frequency_embedding_size": 256,
    "max_timestep": 1.0,
    "vae_block_out_channels": (128, 256, 512, 512),
    "vae_norm_num_groups": 32,
    "vae_layers_per_block": 2,
    "vae_scaling_factor": None,  # of the file's own config.json; without it nothing can be loaded
    "size_sampling_mode": "uniform",
    "dropout_prob": 0.2,
    "ln": False,
    "mode_scale": 0.25,
    "act_checkpoint": False,  # moves memory and no number
    "image_size": None,  # not of the file: pixels; None: as many as `grid` covers
}
KEEP_LAWS = {"uniform": "uniform", "pow2": "powers", "uniform_pow2": "rounded"}

REPA_HEAD = re.compile(r"decoder\.module_dict\.\w+\.(?=out_proj\.)")  # of the alignment loss: training alone


def flextok_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> FlexTokTokenizer:
    """FlexTok from its tensors and numbers, in eval mode and float32.

    config: by the names of FLEXTOK_CONFIG; or the content of the published config.json, of which plain values are read and
    no class is built. Raises UnknownName for a name it does not have, ValueError for a wiring that no published file has,
    and without vae_scaling_factor, CheckpointMismatch listing all keys that do not fit.
    """
    if isinstance(config.get("encoder"), Mapping):
        config = read_config(config)
    for name in config:
        look_up(name, FLEXTOK_CONFIG, "flextok: config key")
    given = FLEXTOK_CONFIG | dict(config)
    side = given["image_size"] or given["grid"] * given["patch_size"] * 2 ** (len(given["vae_block_out_channels"]) - 1)
    width = gcd(*given["vae_block_out_channels"])
    with init_empty_weights(include_buffers=False):
        autoencoder = KLTokenizer(
            side,
            channels=given["latent_channels"],
            width=width,
            mult=[channels // width for channels in given["vae_block_out_channels"]],
            res_blocks=given["vae_layers_per_block"],
            encoder_attention=(),
            groups=given["vae_norm_num_groups"],
            scale=given["vae_scaling_factor"] or 1.0,
        )
        tokenizer = FlexTokTokenizer(
            autoencoder,
            FSQ(given["fsq_levels"]),
            tokens=given["num_registers"],
            patch=given["patch_size"],
            encoder_dim=given["enc_dim"],
            encoder_depth=given["enc_depth"],
            decoder_dim=given["dec_dim"],
            decoder_depth=given["dec_depth"],
            head_dim=given["head_dim"],
            frequencies=given["frequency_embedding_size"],
            time_scale=1000.0 / given["max_timestep"],
            table=(given["grid"], given["grid"]),
            keep_law=look_up(given["size_sampling_mode"], KEEP_LAWS, "flextok: size_sampling_mode"),
            drop_condition=given["dropout_prob"],
            time_law="logit_normal" if given["ln"] else "uniform",
            mode_scale=given["mode_scale"],
        )
    wanted = tokenizer.state_dict()
    same = {f"vae.vae.{name}": f"autoencoder.network.{name}" for name in autoencoder.network.state_dict()}
    heads = {found[0] for key in state if (found := REPA_HEAD.match(key))}
    ignored = {key: None for key in state if key.startswith(tuple(heads))}
    tokenizer.load_state_dict(translate(state, {**FLEXTOK_KEYS, **same, **ignored}, wanted), assign=True)
    if given["vae_scaling_factor"] is None:
        raise ValueError(
            "flextok: vae_scaling_factor is not given; it is vae.scaling_factor in the config.json of the file, and in its "
            "header (header_config)"
        )
    return tokenizer.float().eval()


# ---- config.json

READ = {  # ours: its place in config.json, what their code takes where that is not given
    "enc_dim": ("encoder.enc_transformer.dim", 768),
    "enc_depth": ("encoder.enc_transformer.depth", 12),
    "dec_dim": ("decoder.dec_transformer.dim", 768),
    "dec_depth": ("decoder.dec_transformer.depth", 12),
    "head_dim": ("decoder.dec_transformer.head_dim", 64),
    "patch_size": ("encoder.enc_patch_emb.patch_sizes", None),
    "grid": ("encoder.enc_posemb_module.max_sizes", None),
    "num_registers": ("encoder.enc_register_module.n_max", None),
    "latent_channels": ("vae.latent_channels", 16),
    "fsq_levels": ("regularizer.levels", None),
    "frequency_embedding_size": ("decoder.dec_time_embedder.frequency_embedding_size", 256),
    "max_timestep": ("decoder.dec_time_embedder.max_timestep", 1000.0),
    "vae_scaling_factor": ("vae.scaling_factor", None),
    "size_sampling_mode": ("decoder.dec_nested_dropout.size_sampling_mode", "uniform"),
    "dropout_prob": ("decoder.dec_latent_dropout.dropout_prob", 0.0),
    "ln": ("flow_matching_noise_module.ln", True),
    "mode_scale": ("flow_matching_noise_module.mode_scale", 0.0),
}
TRUNK = {"mlp_ratio": 4.0, "qkv_bias": False, "proj_bias": False, "mlp_bias": False, "gated_mlp": True, "qk_norm": True}
WIRED = {  # its place: what their code takes where it is not given, what it must be
    **{f"encoder.enc_transformer.{name}": (value, value) for name, value in TRUNK.items()},
    **{f"decoder.dec_transformer.{name}": (value, value) for name, value in TRUNK.items()},
    "encoder.enc_posemb_module.posemb_type": ("sincos", "sincos"),
    "encoder.enc_posemb_module.posemb_scaling": ("absolute", "absolute"),
    "encoder.enc_register_module.ordering_mode": ("nested", "nested"),
    "encoder.enc_seq_packer.mask_mode": ("full", "causal_last"),
    "decoder.dec_registers_posemb_module.posemb_type": ("sincos", "learnable_sum"),
    "decoder.dec_patches_posemb_module.posemb_type": ("sincos", "sincos"),
    "decoder.dec_patches_posemb_module.posemb_scaling": ("absolute", "absolute"),
    "decoder.dec_seq_packer.mask_mode": ("full", "full"),
    "decoder.dec_seq_packer.per_subseq_embs": (False, True),
    "decoder.dec_transformer.adaLN_expansion": (1, 2),
}


def read_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json by the names of FLEXTOK_CONFIG; `image_size` may be put beside.

    Raises ValueError naming the place of what is missing, or wired as in no published file.
    """
    for place, (default, must) in WIRED.items():
        if (found := _at(content, place, default)) != must:
            raise ValueError(f"flextok: {place} is {found!r} in config.json, {must!r} in every published file")
    found = {name: _at(content, place, default) for name, (place, default) in READ.items()}
    for name in ("patch_size", "grid"):
        place, sides = READ[name][0], found[name]
        if not sides or len(sides) != 2 or sides[0] != sides[1]:
            raise ValueError(f"flextok: {place} is {sides!r} in config.json, must be two equal numbers")
        found[name] = sides[0]
    return {**found, "image_size": content.get("image_size")}


def _at(content: Mapping[str, Any], place: str, default: Any) -> Any:
    """What config.json has at `place`; the modules of the two networks lie one level deeper, under module_dict."""
    room, *module, name = place.split(".")
    section = content.get(room)
    for part in ("module_dict", *module) if module else ():
        section = section.get(part) if isinstance(section, Mapping) else None
    if not isinstance(section, Mapping):
        raise ValueError(f"flextok: config.json has no {'.'.join((room, *module))}; it holds {sorted(content)}")
    return section.get(name, default)


def header_config(path: str | Path) -> dict[str, Any]:
    """What the header of a published safetensors file says of its wiring, as config.json has it.

    Raises ValueError for a header that holds something else than plain values.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    try:
        return {name: ast.literal_eval(text) for name, text in metadata.items() if text.startswith("{")}
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: its header holds something else than plain values ({error})") from error
