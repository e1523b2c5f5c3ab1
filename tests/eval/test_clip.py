"""The CMMD network, built small: its input, its forward, and the layouts in which its weights are published."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from eval import clip
from eval.clip import clip_input, clip_network, image_tower, load_clip
from eval.features import FeatureError
from eval.files import sha256_of
from eval.weights import SOURCES
from tests.torchscript import write_torchscript

WIDTH, DEPTH, HEADS, PATCH, DIM = 32, 2, 4, 14, 20
PLACES = 1 + (336 // PATCH) ** 2
SIZES = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "dim": DIM}


@pytest.fixture(scope="module")
def openai() -> dict[str, Tensor]:
    """As OpenAI publishes it, in half precision, with a little of the text half."""
    shapes = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (PLACES, WIDTH),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "visual.proj": (WIDTH, DIM),
        "transformer.resblocks.0.ln_1.weight": (5,),
        "positional_embedding": (7, 5),
        "text_projection": (5, DIM),
        "logit_scale": (),
    }
    shapes |= {f"visual.{name}.{part}": (WIDTH,) for name in ("ln_pre", "ln_post") for part in ("weight", "bias")}
    for number in range(DEPTH):
        for name, shape in {
            "ln_1.weight": (WIDTH,),
            "ln_1.bias": (WIDTH,),
            "attn.in_proj_weight": (3 * WIDTH, WIDTH),
            "attn.in_proj_bias": (3 * WIDTH,),
            "attn.out_proj.weight": (WIDTH, WIDTH),
            "attn.out_proj.bias": (WIDTH,),
            "ln_2.weight": (WIDTH,),
            "ln_2.bias": (WIDTH,),
            "mlp.c_fc.weight": (4 * WIDTH, WIDTH),
            "mlp.c_fc.bias": (4 * WIDTH,),
            "mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
            "mlp.c_proj.bias": (WIDTH,),
        }.items():
            shapes[f"visual.transformer.resblocks.{number}.{name}"] = shape
    rng = torch.Generator().manual_seed(0)
    return {name: (0.3 * torch.randn(shape, generator=rng)).half() for name, shape in shapes.items()}


def transformers_layout(openai: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in the names of Hugging Face's CLIPModel, float32."""
    theirs = {
        "vision_model.embeddings.class_embedding": openai["visual.class_embedding"],
        "vision_model.embeddings.position_embedding.weight": openai["visual.positional_embedding"],
        "vision_model.embeddings.position_ids": torch.arange(PLACES)[None],
        "vision_model.embeddings.patch_embedding.weight": openai["visual.conv1.weight"],
        "visual_projection.weight": openai["visual.proj"].T.contiguous(),
        "text_model.final_layer_norm.weight": torch.ones(5),
        "logit_scale": openai["logit_scale"],
    }
    for part in ("weight", "bias"):
        theirs[f"vision_model.pre_layrnorm.{part}"] = openai[f"visual.ln_pre.{part}"]
        theirs[f"vision_model.post_layernorm.{part}"] = openai[f"visual.ln_post.{part}"]
        for number in range(DEPTH):
            ours, block = f"vision_model.encoder.layers.{number}", f"visual.transformer.resblocks.{number}"
            joined = openai[f"{block}.attn.in_proj_{part}"].chunk(3)
            theirs |= {f"{ours}.self_attn.{name}_proj.{part}": it for name, it in zip("qkv", joined, strict=True)}
            theirs[f"{ours}.self_attn.out_proj.{part}"] = openai[f"{block}.attn.out_proj.{part}"]
            theirs[f"{ours}.layer_norm1.{part}"] = openai[f"{block}.ln_1.{part}"]
            theirs[f"{ours}.layer_norm2.{part}"] = openai[f"{block}.ln_2.{part}"]
            theirs[f"{ours}.mlp.fc1.{part}"] = openai[f"{block}.mlp.c_fc.{part}"]
            theirs[f"{ours}.mlp.fc2.{part}"] = openai[f"{block}.mlp.c_proj.{part}"]
    return {name: it.float() if it.is_floating_point() else it for name, it in theirs.items()}


def pictures(count: int, height: int, width: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=rng, dtype=torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (65, 40), (336, 400), (500, 501)])
def test_the_input_is_that_of_the_published_code(height: int, width: int) -> None:
    """PIL: the centre square, bicubic to 336, / 255, then CLIP's mean and deviation."""
    wanted = []
    for picture in pictures(2, height, width):
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        image = Image.fromarray(np.asarray(picture.movedim(0, -1))).crop((left, top, left + side, top + side))
        x = np.asarray(image.resize((336, 336), Image.Resampling.BICUBIC)).astype(np.float64) / 255
        x = (x - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
        wanted.append(torch.from_numpy(x).movedim(-1, 0))
    assert_close(clip_input(pictures(2, height, width)), torch.stack(wanted).float(), atol=1e-6, rtol=0)


def by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """OpenAI's image tower from its definition, with torch's own attention."""
    w = {name.removeprefix("visual."): it.float() for name, it in state.items() if name.startswith("visual.")}

    def normalised(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    patches = F.conv2d(x, w["conv1.weight"], stride=PATCH).flatten(2).mT
    x = torch.cat((w["class_embedding"].expand(len(x), 1, -1), patches), dim=1) + w["positional_embedding"]
    x = normalised(x, "ln_pre")
    for number in range(DEPTH):
        block = f"transformer.resblocks.{number}"
        attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        attention.load_state_dict({name: w[f"{block}.attn.{name}"] for name in names})
        y = normalised(x, f"{block}.ln_1")
        x = x + attention(y, y, y, need_weights=False)[0]
        y = F.linear(normalised(x, f"{block}.ln_2"), w[f"{block}.mlp.c_fc.weight"], w[f"{block}.mlp.c_fc.bias"])
        x = x + F.linear(y * torch.sigmoid(1.702 * y), w[f"{block}.mlp.c_proj.weight"], w[f"{block}.mlp.c_proj.bias"])
    return normalised(x[:, 0], "ln_post") @ w["proj"]


@torch.inference_mode()
def test_every_layout_makes_the_network_of_the_definition(openai: dict[str, Tensor], tmp_path: Path) -> None:
    """OpenAI's TorchScript, whose program is not run; its state dict; transformers'; timm's."""
    write_torchscript(openai, tmp_path / "ViT-L-14-336px.pt")
    torch.save(openai, tmp_path / "openai.pth")
    torch.save(transformers_layout(openai), tmp_path / "transformers.bin")
    torch.save(image_tower(openai), tmp_path / "timm.pth")
    batch = pictures(2, 48, 40)
    x = clip_input(torch.stack((batch[0], batch[1] // 4)))
    wanted = by_hand(openai, x)
    assert (wanted[0] - wanted[1]).abs().max() > 0.05
    for file in tmp_path.iterdir():
        found = load_clip(file, **SIZES)(x)
        assert found.dtype == torch.float32
        assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_embeddings_are_unit_vectors_under_the_name_that_the_checksum_allows(
    openai: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_torchscript(openai, tmp_path / "published.pt")
    torch.save(transformers_layout(openai), tmp_path / "other.bin")
    monkeypatch.setattr(clip, "load_clip", lambda path, load=load_clip: load(path, **SIZES))
    sha256 = sha256_of(tmp_path / "published.pt")
    monkeypatch.setitem(SOURCES, "clip", replace(SOURCES["clip"], sha256=sha256))
    ours, other = clip_network(tmp_path / "published.pt", strict=True), clip_network(tmp_path / "other.bin")
    embedding = ours.extract(pictures(3, 40, 32))["image_embedding"]
    assert_close(embedding.norm(dim=1), torch.ones(3))
    assert_close(other.extract(pictures(3, 40, 32))["image_embedding"], embedding)
    assert (ours.record.distance, ours.record.comparable_to_papers) == ("fd_clip", True)
    assert (other.record.distance, other.record.comparable_to_papers) == ("fd_clip_unverified", False)
    assert "unverified" in other.record.name and ours.record.weights_sha256 == sha256


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (without("visual.proj"), r"head\.weight is missing"),
        (without("visual.ln_post.bias"), r"norm\.bias is missing"),
        (lambda state: state | {"visual.attnpool.weight": torch.zeros(2)}, r"attnpool\.weight is not of this network"),
        (
            lambda state: state | {"visual.positional_embedding": torch.zeros(257, WIDTH)},
            r"pos_embed is \(1, 257, 32\)",
        ),
        (
            lambda state: without("vision_model.encoder.layers.1.self_attn.k_proj.weight")(transformers_layout(state)),
            r"blocks\.1\.attn\.qkv\.weight is missing",
        ),
        (lambda state: {"fc.weight": torch.zeros(2, 2)}, r"cls_token is missing"),
    ],
)
def test_another_network_is_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], fault: str, openai: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(change(openai), tmp_path / "wrong.pth")
    with pytest.raises(FeatureError, match=fault) as caught:
        load_clip(tmp_path / "wrong.pth", **SIZES)
    assert "wrong.pth" in str(caught.value) and "--metric-weights clip=FILE" in str(caught.value)
