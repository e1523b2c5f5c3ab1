"""Alignment: patches inside a tokenizer's decoder are to say what DINOv2 sees there. A term of training, then dropped.

Sources: REPA (Yu et al. 2024, "Representation Alignment for Generation", arXiv:2410.06940, sec. 3.3); D-AR (Gao & Shou 2025,
arXiv:2505.23660) for a decoder of pixels. The teacher is timm's copy of DINOv2 ViT-B/14 (Oquab et al. 2023,
arXiv:2304.07193), from the Hugging Face hub or a file; it rests, and is no part of the state.

Dims: B batch, C channels of a patch of the decoder, h x w of them, g x g patches of the teacher, of F features each.
"""

from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from huggingface_hub import hf_hub_download
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional

from layers.checkpoint import CheckpointError, read_tensors
from layers.keymap import check_keys
from training.loop import Through

ARCHITECTURE, HUB, FILE = "vit_base_patch14_dinov2", "timm/vit_base_patch14_dinov2.lvd142m", "model.safetensors"
SIDE = 224  # pixels at which the teacher looks
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class FeatureAlignment(nn.Module):
    """features (B, C, h, w), images (B, 3, H, W) in [-1, 1] -> 1 - cosine of the head's features and the teacher's, averaged.

    The features are averaged over the teacher's grid and go through the head, three linear layers of width `hidden`.
    channels: C. teacher_weights: a file of the teacher's tensors, timm's or Meta's; None: downloaded once. Raises
    CheckpointError where they cannot be had, CheckpointMismatch where they are another network's.
    """

    def __init__(self, channels: int, hidden: int = 2048, teacher_weights: str | None = None) -> None:
        super().__init__()
        teacher = load_teacher(teacher_weights)
        self._teacher = (teacher,)  # a tuple: no part of the state
        self.grid = teacher.patch_embed.grid_size
        self.head = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, teacher.num_features),
        )
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        pooled = functional.adaptive_avg_pool2d(features, self.grid)
        guess = self.head(rearrange(pooled, "b c h w -> b (h w) c"))
        return (1 - functional.cosine_similarity(guess.float(), self.seen(images).float(), dim=-1)).mean()

    @torch.no_grad()
    def seen(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> what the teacher says of its patches (B, g g, F)."""
        teacher = self._teacher[0].to(images.device)
        x = functional.interpolate(((images + 1) / 2 - self.mean) / self.std, (SIDE, SIDE), mode="bicubic")
        return teacher.forward_features(x)[:, teacher.num_prefix_tokens :]


def load_teacher(path: str | Path | None, **sizes: Any) -> nn.Module:
    """The teacher at 224 x 224, in eval mode, without gradients. sizes: other widths, for timm."""
    if path is None:
        try:
            path = hf_hub_download(HUB, FILE)
        except Exception as error:  # the hub's client lets the errors of its HTTP library through
            raise CheckpointError(
                f"the alignment term needs DINOv2's weights, and {FILE} of {HUB} could not be had "
                f"({type(error).__name__}); go online, or download it elsewhere and give the file as teacher_weights"
            ) from error
    with torch.device("meta"):
        teacher = timm.create_model(ARCHITECTURE, img_size=SIDE, num_classes=0, **sizes)
    state = checkpoint_filter_fn(read_tensors(path), teacher)  # Meta's names, and places for 37 x 37 patches
    state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    check_keys(state, teacher.state_dict())
    teacher.load_state_dict(state, assign=True)
    return teacher.eval().requires_grad_(False)


class WithAlignment(Through):
    """A tokenizer and the alignment that learns beside it, as one module to train.

    images -> what the tokenizer's forward gives, with one more term "alignment" in place of the "features" that it is made of.
    Raises ValueError for a tokenizer that gives none.
    """

    def __init__(self, tokenizer: nn.Module, alignment: FeatureAlignment) -> None:
        super().__init__(tokenizer, self._with_term)
        self.alignment = alignment

    def _with_term(self, images: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
        reconstruction, parts = self.module(images)
        features = parts.pop("features", None)
        if features is None:
            raise ValueError(
                f"alignment reads the features of a tokenizer, {type(self.module).__name__} gives {sorted(parts)}; "
                "of a DARTokenizer features_at must be a block of its flow"
            )
        parts["alignment"] = self.alignment(features, images)
        return reconstruction, parts
