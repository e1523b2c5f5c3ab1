"""The FD-DINOv2 network, built small: its input, its forward and its embedding of places against their definitions."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision import transforms

from eval import dinov2
from eval.dinov2 import dinov2_input, dinov2_network, load_dinov2, place_embedding
from eval.features import FeatureError
from eval.files import sha256_of
from eval.weights import SOURCES

WIDTH, DEPTH, HEADS, PATCH, GRID = 24, 2, 3, 14, 37
SIZES = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """As Meta publishes it: places of 518 pixels, scales of the branches, a mask token that pictures do not need."""
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + GRID**2, WIDTH),
        "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for number in range(DEPTH):
        for name, shape in {
            "norm1.weight": (WIDTH,),
            "norm1.bias": (WIDTH,),
            "attn.qkv.weight": (3 * WIDTH, WIDTH),
            "attn.qkv.bias": (3 * WIDTH,),
            "attn.proj.weight": (WIDTH, WIDTH),
            "attn.proj.bias": (WIDTH,),
            "ls1.gamma": (WIDTH,),
            "norm2.weight": (WIDTH,),
            "norm2.bias": (WIDTH,),
            "mlp.fc1.weight": (4 * WIDTH, WIDTH),
            "mlp.fc1.bias": (4 * WIDTH,),
            "mlp.fc2.weight": (WIDTH, 4 * WIDTH),
            "mlp.fc2.bias": (WIDTH,),
            "ls2.gamma": (WIDTH,),
        }.items():
            shapes[f"blocks.{number}.{name}"] = shape
    rng = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(state, path)
    return path


def pictures(count: int, height: int, width: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=rng, dtype=torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (224, 224), (300, 450)])
def test_the_input_is_that_of_the_published_code(height: int, width: int) -> None:
    """torchvision's transforms of PIL pictures: Resize((224, 224), bicubic), ToTensor, Normalize."""
    published = transforms.Compose(
        [
            transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    batch = pictures(2, height, width)
    wanted = [published(Image.fromarray(np.asarray(picture.movedim(0, -1)))) for picture in batch]
    assert_close(dinov2_input(batch), torch.stack(wanted), atol=1e-6, rtol=0)


def by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The class token of a vision transformer with scaled branches, from its definition."""

    def normalised(x: Tensor, name: str) -> Tensor:
        deviation = (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return (x - x.mean(-1, keepdim=True)) / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    cells = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (b, 3, 16, 16, 14, 14)
    patches = torch.einsum("bcyxhw,dchw->byxd", cells, state["patch_embed.proj.weight"]).flatten(1, 2)
    x = torch.cat((state["cls_token"].expand(len(x), -1, -1), patches + state["patch_embed.proj.bias"]), dim=1)
    x = x + place_embedding(state["pos_embed"], 16)
    for number in range(DEPTH):
        block = f"blocks.{number}"
        qkv = linear(normalised(x, f"{block}.norm1"), f"{block}.attn.qkv").view(*x.shape[:2], 3, HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT / math.sqrt(WIDTH / HEADS)).softmax(-1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.proj") * state[f"{block}.ls1.gamma"]
        hidden = linear(normalised(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + linear(hidden, f"{block}.mlp.fc2") * state[f"{block}.ls2.gamma"]
    return normalised(x, "norm")[:, 0]


@torch.inference_mode()
def test_the_forward_is_that_of_its_definition(state: dict[str, Tensor], file: Path) -> None:
    model = load_dinov2(file, **SIZES)
    x = dinov2_input(pictures(2, 64, 64))
    assert_close(model(x), by_hand(state, x), atol=2e-5, rtol=1e-5)


def test_places_are_interpolated_by_the_published_scale(state: dict[str, Tensor]) -> None:
    """Cell i of 16 lies at (i + 1/2) * 37 / 16.1 - 1/2 of 37, with cubic weights of a = -3/4 and no antialiasing."""
    trained = state["pos_embed"].double()
    weights = torch.zeros(16, GRID, dtype=torch.float64)
    for cell in range(16):
        place = (cell + 0.5) * GRID / 16.1 - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            away = abs(place - tap)
            near = 1.25 * away**3 - 2.25 * away**2 + 1
            far = -0.75 * (away**3 - 5 * away**2 + 8 * away - 4)
            weights[cell, min(max(tap, 0), GRID - 1)] += near if away <= 1 else far
    wanted = torch.einsum("yh,xw,hwd->yxd", weights, weights, trained[0, 1:].view(GRID, GRID, WIDTH))
    found = place_embedding(state["pos_embed"], 16)
    assert_close(found[0, 1:], wanted.float().flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert torch.equal(found[:, 0], state["pos_embed"][:, 0])
    assert torch.equal(place_embedding(state["pos_embed"], GRID), state["pos_embed"])
    antialiased = F.interpolate(trained[:, 1:].mT.unflatten(-1, (GRID, GRID)), (16, 16), mode="bicubic", antialias=True)
    assert (found[0, 1:] - antialiased[0].flatten(1).mT).abs().max() > 0.1  # what timm would do by itself


def test_the_name_of_its_distance_depends_on_the_checksum(
    file: Path, state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's layout, without the mask token, is another file: its numbers are the same, but nothing vouches for them."""
    path = tmp_path / "timm.safetensors"
    save_file({name: tensor for name, tensor in state.items() if name != "mask_token"}, path)
    monkeypatch.setattr(dinov2, "load_dinov2", lambda path, load=load_dinov2: load(path, **SIZES))
    monkeypatch.setitem(SOURCES, "dinov2", replace(SOURCES["dinov2"], sha256=sha256_of(file)))
    ours, other = dinov2_network(file, strict=True), dinov2_network(path)
    batch = pictures(1, 32, 32)
    assert torch.equal(ours.extract(batch)["class_token"], other.extract(batch)["class_token"])
    assert (ours.record.distance, ours.record.comparable_to_papers) == ("fd_dinov2", True)
    assert (other.record.distance, other.record.comparable_to_papers) == ("fd_dinov2_unverified", False)
    assert "unverified" in other.record.name and other.record.weights_sha256 == sha256_of(path)
    with pytest.raises(FeatureError, match=r"timm\.safetensors: sha256 "):
        dinov2_network(path, strict=True)


def test_another_network_is_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    faults = {
        "grid.pth": (state | {"pos_embed": torch.zeros(1, 1 + 30, WIDTH)}, "30 places are no square grid"),
        "flat.pth": (state | {"pos_embed": torch.zeros(5)}, "none of DINOv2"),
        "registers.pth": (
            state | {"register_tokens": torch.zeros(1, 4, WIDTH)},
            "register_tokens is not of this network",
        ),
        "wide.pth": (state | {"norm.bias": torch.zeros(7)}, r"norm\.bias is \(7,\), must be \(24,\)"),
        "bare.pth": ({"fc.weight": torch.zeros(3, 3)}, "cls_token is missing"),
    }
    for name, (content, fault) in faults.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(FeatureError, match=fault) as caught:
            load_dinov2(tmp_path / name, **SIZES)
        assert name in str(caught.value) and "--metric-weights dinov2=FILE" in str(caught.value)
