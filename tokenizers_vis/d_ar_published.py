"""D-AR's published tokenizer: its original names for tensors, and its configuration."""

from collections.abc import Mapping
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor

from layers.keymap import Join, Target, translate
from layers.record import look_up
from tokenizers_vis.d_ar import DARTokenizer
from tokenizers_vis.quantizers import VectorQuantizer

DAR_CONFIG: dict[str, Any] = {  # the section `model` of the original configuration, and its published values
    "encoder_patch_size": 16,
    "num_encoder_layers": 8,
    "num_decoder_layers": 8,
    "query_low_rank": True,
    "encoder_dim": 768,
    "decoder_dim": 768,
    "vq_dim": 8,
    "vq_codebook_size": 16384,
    "vq_enable": True,
    "num_denoising_steps": 8,
    "num_query_groups": 8,
    "num_all_queries": 256,
    "queries_per_step": None,
    "sampling_resolution": 256,
    "output_resolution": 0,
    "rope_base_len": 10_000,
    "diff_decoder": {},
    "head_dim": 64,  # fixed in the original
}
DIFF_DECODER: dict[str, Any] = {  # its section of that name
    "in_dim": 3,
    "out_dim": 3,
    "dim": 768,
    "cond_dim": 768,
    "patch_size": 8,
    "depth": 12,
    "data_std": 1.0,
    "time_shift": 1.0,
    "mlp_head": False,
    "share_time_encoding": False,
    "repa_layer": 8,
    "rope_base_len": 10_000,
    "grad_checkpointing": True,  # moves memory and no number
    "cfg": 1.0,  # not read
}
MUST = {"vq_enable": True, "output_resolution": 0, "in_dim": 3, "out_dim": 3}  # what no published file has otherwise
QUERY_RANK = 8  # where it is low


def _both(theirs: str, ours: str) -> dict[str, Target]:
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}


def _attention(theirs: str, ours: str) -> dict[str, Target]:
    keys = {}
    for name, own in {"q": "q", "proj": "out", "q_norm": "q_norm", "k_norm": "k_norm"}.items():
        keys |= _both(f"{theirs}.{name}", f"{ours}.{own}")
    for place, name in enumerate("kv"):
        keys |= {f"{theirs}.{name}.{part}": Join(f"{ours}.kv.{part}", place, 2) for part in ("weight", "bias")}
    return keys


def _block(theirs: str, ours: str) -> dict[str, Target]:
    keys: dict[str, Target] = {**_attention(f"{theirs}.attention", f"{ours}.attention")}
    for part in ("mlp.fc1", "mlp.fc2"):
        keys |= _both(f"{theirs}.{part}", f"{ours}.{part}")
    for i in (1, 2):
        keys |= {**_both(f"{theirs}.norm{i}", f"{ours}.norm_{i}"), f"{theirs}.gate{i}": f"{ours}.gate_{i}"}
    return keys


def _matrix(kernel: Tensor) -> Tensor:
    """A 1 x 1 convolution (c, d, 1, 1)."""
    return kernel.flatten(1)


FLOW = "diff_decoder.net"
FLOW_BLOCK = f"{FLOW}.blocks.{{i}}"
DAR_KEYS: dict[str, Target] = {  # theirs -> ours; None: ignored, for the reason beside it
    **_both("patchify", "encoder.patch"),
    **_both("query_linear", "encoder.query"),
    **_block("encoder_layers.{i}", "encoder.blocks.{i}"),
    **_block("decoder_layers.{i}", "code_stack.blocks.{i}"),
    "quant_in_conv.weight": ("encoder.out.weight", _matrix),
    "quant_out_conv.weight": ("code_stack.embed.weight", _matrix),
    "quantize.embedding.weight": "quantizer.rows",
    "quantize.codebook_used": None,  # the ids last seen in training
    **_both(f"{FLOW}.cond_mlp", "flow.window"),
    f"{FLOW}.conv_in.weight": ("flow.embed.weight", _matrix),
    f"{FLOW}.conv_in.bias": "flow.embed.bias",
    f"{FLOW}.conv_out.weight": ("flow.readout.weight", _matrix),
    f"{FLOW}.conv_out.bias": "flow.readout.bias",
    **_both(f"{FLOW}.linear_out.linear", "flow.readout"),
    **_both(f"{FLOW}.linear_out.adaLN_modulation.1", "flow.modulation.project"),
    **_attention(f"{FLOW_BLOCK}.attention", "flow.blocks.{i}.attention"),
    **_attention(f"{FLOW_BLOCK}.cross_attn", "flow.blocks.{i}.look"),
    **_both(f"{FLOW_BLOCK}.adaLN_modulation.1", "flow.blocks.{i}.modulation.project"),
    **_both(f"{FLOW}.time_embed.mlp.{{j}}", "flow.time.{j}"),
    **_both(f"{FLOW_BLOCK}.time_embed.mlp.{{j}}", "flow.blocks.{i}.time.{j}"),
    **_both(f"{FLOW_BLOCK}.cond_embed.{{j}}", "flow.blocks.{i}.window.{j}"),
    **_both(f"{FLOW_BLOCK}.mlp.fc{{j}}", "flow.blocks.{i}.mlp.fc{j}"),
    f"{FLOW}.repa_out.{{j}}.weight": None,  # the head of the alignment loss, of training alone
    f"{FLOW}.repa_out.{{j}}.bias": None,
}


def d_ar_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> DARTokenizer:
    """D-AR's tokenizer under the section `model` of its original configuration, in eval mode and float32.

    sampling_resolution may be a pair. Raises UnknownName for a key it does not have, ValueError for one that no published
    file has so, CheckpointMismatch listing all keys that do not fit.
    """
    for name in config:
        look_up(name, DAR_CONFIG, "d-ar: config key")
    given = DAR_CONFIG | dict(config)
    for name in given["diff_decoder"]:
        look_up(name, DIFF_DECODER, "d-ar: diff_decoder key")
    flow = DIFF_DECODER | dict(given["diff_decoder"])
    for name, must in MUST.items():
        if (found := (given | flow)[name]) != must:
            raise ValueError(f"d-ar: {name} is {found!r}, must be {must!r}")
    if flow["cond_dim"] != given["decoder_dim"]:
        raise ValueError(f"d-ar: cond_dim={flow['cond_dim']} must be decoder_dim={given['decoder_dim']}")
    with init_empty_weights(include_buffers=False):
        tokenizer = DARTokenizer(
            given["sampling_resolution"],
            VectorQuantizer(given["vq_codebook_size"], given["vq_dim"], normalize=True),
            tokens=given["num_all_queries"],
            groups=given["num_query_groups"],
            window=given["queries_per_step"],
            steps=given["num_denoising_steps"],
            encoder_patch=given["encoder_patch_size"],
            encoder_dim=given["encoder_dim"],
            encoder_depth=given["num_encoder_layers"],
            query_rank=QUERY_RANK if given["query_low_rank"] else None,
            code_dim=given["decoder_dim"],
            code_depth=given["num_decoder_layers"],
            flow_patch=flow["patch_size"],
            flow_dim=flow["dim"],
            flow_depth=flow["depth"],
            head_dim=given["head_dim"],
            theta=given["rope_base_len"],
            flow_theta=flow["rope_base_len"],
            shared_time=flow["share_time_encoding"],
            timed_readout=flow["mlp_head"],
            features_at=flow["repa_layer"],
            data_std=flow["data_std"],
            time_shift=flow["time_shift"],
        )

    def used(table: Tensor) -> Tensor:  # of its 1024 rows
        return table[: given["num_all_queries"]]

    tables: dict[str, Target] = {
        "query_embedding.weight": ("encoder.queries", used),
        "decoder_embedding.weight": ("code_stack.places", used),
    }
    tokenizer.load_state_dict(translate(state, DAR_KEYS | tables, tokenizer.state_dict()), assign=True)
    return tokenizer.float().eval()
