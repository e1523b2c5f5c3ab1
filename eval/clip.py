"""CMMD features: the unit image embeddings of CLIP ViT-L/14 at 336 pixels.

Sources: Jayasumana et al. 2024 (CMMD, arXiv:2401.09603), whose preprocessing this is; Radford et al. 2021 (CLIP,
arXiv:2103.00020). The network is timm's. Its weights are read from OpenAI's TorchScript file (half precision, whose
program is not run), or from the layouts of transformers and timm.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.features import FeatureNetwork, NetworkRecord
from eval.files import sha256_of
from eval.resize import resize
from eval.weights import fill, find_weights, is_published, read_state

NETWORK = "clip"
ARCHITECTURE = "vit_large_patch14_clip_quickgelu_336"
LAYER, DIM = "image_embedding", 768
SIDE = 336
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

OPENAI = {  # theirs, after "visual." -> timm's
    r"conv1\.": "patch_embed.proj.",
    r"class_embedding": "cls_token",
    r"positional_embedding": "pos_embed",
    r"ln_pre\.": "norm_pre.",
    r"ln_post\.": "norm.",
    r"proj": "head.weight",
    r"transformer\.resblocks\.(\d+)\.ln_([12])\.": r"blocks.\1.norm\2.",
    r"transformer\.resblocks\.(\d+)\.attn\.in_proj_": r"blocks.\1.attn.qkv.",
    r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.": r"blocks.\1.attn.proj.",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.": r"blocks.\1.mlp.fc1.",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.": r"blocks.\1.mlp.fc2.",
}
TRANSFORMERS = {  # theirs, after "vision_model." -> timm's
    r"embeddings\.patch_embedding\.": "patch_embed.proj.",
    r"embeddings\.class_embedding": "cls_token",
    r"embeddings\.position_embedding\.weight": "pos_embed",
    r"pre_layrnorm\.": "norm_pre.",
    r"post_layernorm\.": "norm.",
    r"encoder\.layers\.(\d+)\.layer_norm([12])\.": r"blocks.\1.norm\2.",
    r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.": r"blocks.\1.attn.\2.",
    r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.": r"blocks.\1.attn.proj.",
    r"encoder\.layers\.(\d+)\.mlp\.fc([12])\.": r"blocks.\1.mlp.fc\2.",
}


def clip_network(
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    allow_download: bool = False,
    strict: bool = False,
) -> FeatureNetwork:
    """The network of CMMD on `device`, in float32; its output "image_embedding" is (B, 768), rows of length 1.

    The record's distance is the Fréchet distance of these embeddings; a kernel distance is CMMD only where the record
    says `comparable_to_papers`. weights: a local file; without it, what eval/weights.py finds. strict: a file with
    another checksum than OpenAI's is an error.
    Raises MetricWeightsMissing where there is no file, FeatureError for one that is damaged or of another network.
    """
    path = find_weights(NETWORK, weights, allow_download)
    sha256 = sha256_of(path)
    published = is_published(NETWORK, path, sha256, strict)
    model = load_clip(path).to(device)
    record = NetworkRecord(
        name="CLIP ViT-L/14 at 336 pixels" + ("" if published else " (unverified weights)"),
        layer=LAYER,
        dim=DIM,
        weights_sha256=sha256,
        preprocessing=f"centre square, PIL bicubic of uint8 to {SIDE}x{SIDE}, CLIP's mean and deviation, unit length",
        distance="fd_clip" if published else "fd_clip_unverified",
        comparable_to_papers=published,
    )

    def extract(pictures: Tensor) -> dict[str, Tensor]:
        return {LAYER: F.normalize(model(clip_input(pictures)), dim=1)}

    return FeatureNetwork(record, torch.device(device), torch.float32, extract)


def clip_input(pictures: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, 336, 336) of the centre square, normalised."""
    height, width = pictures.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pictures[..., top : top + side, left : left + side]
    mean, std = (torch.tensor(it, device=pictures.device).view(3, 1, 1) for it in (MEAN, STD))
    return (resize(square, (SIDE, SIDE), "pil_uint8") / 255 - mean) / std


def load_clip(path: Path, architecture: str = ARCHITECTURE, dim: int = DIM, **sizes: Any) -> nn.Module:
    """timm's image tower and projection, in eval mode, with the tensors of a file. sizes: other widths for timm.

    Raises FeatureError for a file that is damaged or holds another network, the tower without its projection too.
    """
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=dim, **sizes)
    fill(model, image_tower(read_state(path, NETWORK)), path, NETWORK)
    return model.eval().requires_grad_(False)


def image_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image half of CLIP under timm's names, from the layout of OpenAI, transformers or timm; the text is left."""
    if "visual.class_embedding" in state:
        tower = {_renamed(name, OPENAI): it for key, it in state.items() if (name := _after("visual.", key))}
        if "head.weight" in tower:
            tower["head.weight"] = tower["head.weight"].T.contiguous()
    elif "vision_model.embeddings.class_embedding" in state:
        tower = {
            _renamed(name, TRANSFORMERS): it for key, it in state.items() if (name := _after("vision_model.", key))
        }
        tower.pop("embeddings.position_ids", None)  # 0, 1, 2, …: no weights
        if "visual_projection.weight" in state:
            tower["head.weight"] = state["visual_projection.weight"]
        tower = _with_joined_attention(tower)
    else:
        return dict(state)
    if "cls_token" in tower:
        tower["cls_token"] = tower["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in tower:
        tower["pos_embed"] = tower["pos_embed"][None]
    if "head.weight" in tower:
        tower["head.bias"] = torch.zeros(len(tower["head.weight"]))
    return tower


def _after(prefix: str, key: str) -> str:
    return key.removeprefix(prefix) if key.startswith(prefix) else ""


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for pattern, ours in table.items():
        if (hit := re.match(pattern + ("" if pattern.endswith((".", "_")) else "$"), name)) is not None:
            return hit.expand(ours) + name[hit.end() :]
    return name


def _with_joined_attention(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of every block as one matrix, in this order."""
    joined = {name: tensor for name, tensor in tower.items() if not re.search(r"\.attn\.[qkv]\.", name)}
    for name in tower:
        if ".attn.q." in name:
            parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
            if all(part in tower for part in parts):
                joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([tower[part] for part in parts])
    return joined
