"""The alignment term: closed forms on a small teacher, files of its weights, and a run that leaves its head behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

import training.alignment
from layers.checkpoint import CheckpointError, save_tensors
from layers.keymap import CheckpointMismatch
from training.alignment import FeatureAlignment, WithAlignment, load_teacher
from training.jobs import tokenizer_job
from training.options import parse, tokenizer_parser
from training.run import RunError, load_run

SIZES = {"embed_dim": 12, "depth": 1, "num_heads": 2}
LOADED = load_teacher


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of a small teacher with random weights, which `load_teacher` takes for the published size."""
    monkeypatch.setattr(training.alignment, "load_teacher", lambda path: LOADED(path, **SIZES))
    torch.manual_seed(0)
    teacher = training.alignment.timm.create_model("vit_base_patch14_dinov2", img_size=224, num_classes=0, **SIZES)
    path = tmp_path / "dinov2.safetensors"
    save_tensors(path, {name: torch.randn_like(tensor) for name, tensor in teacher.state_dict().items()})
    return path


def pictures() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_term_is_one_less_the_cosine_of_pooled_patches(weights: Path) -> None:
    alignment = FeatureAlignment(channels=5, hidden=6, teacher_weights=str(weights))
    assert {name.split(".")[0] for name in alignment.state_dict()} == {"head"}
    wanted = alignment.seen(pictures())
    assert wanted.shape == (2, 256, 12) and not wanted.requires_grad
    features = torch.randn(2, 5, 32, 32)
    pooled = features.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)).flatten(2).transpose(1, 2)  # 2 x 2 means, by hand
    guess = alignment.head(pooled)
    cosine = (guess * wanted).sum(-1) / (guess.norm(dim=-1) * wanted.norm(dim=-1))
    assert_close(alignment(features, pictures()), (1 - cosine).mean(), rtol=1e-5, atol=1e-6)
    alignment.head = nn.Identity()
    same = wanted.transpose(1, 2).unflatten(2, (16, 16))
    assert_close(alignment(3 * same, pictures()), torch.tensor(0.0), rtol=0, atol=1e-6)
    assert_close(alignment(-same, pictures()), torch.tensor(2.0), rtol=0, atol=1e-6)


def test_the_teacher_sees_pictures_as_it_was_trained_to(weights: Path) -> None:
    """A grey picture of ImageNet's mean is a picture of zeros to it."""
    alignment = FeatureAlignment(channels=5, teacher_weights=str(weights))
    grey = (2 * alignment.mean - 1).expand(1, 3, 32, 32)
    teacher = LOADED(weights, **SIZES)
    wanted = teacher.forward_features(torch.zeros(1, 3, 224, 224))[:, 1:]
    assert_close(alignment.seen(grey), wanted, rtol=0, atol=1e-4)


def test_weights_that_are_not_to_be_had_or_of_another_network_are_named(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tensors(tmp_path / "other.safetensors", {"patch": torch.zeros(1)})
    with pytest.raises(CheckpointMismatch, match="patch is not in the model"):
        LOADED(tmp_path / "other.safetensors", **SIZES)

    def offline(*_: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(training.alignment, "hf_hub_download", offline)
    with pytest.raises(CheckpointError, match=r"ConnectionError\); go online, or .* teacher_weights"):
        LOADED(None)


class Shallow(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return images, {"flow": images.mean(), "features": None}


def test_a_tokenizer_without_features_is_refused(weights: Path) -> None:
    model = WithAlignment(Shallow(), FeatureAlignment(5, teacher_weights=str(weights)))
    with pytest.raises(ValueError, match=r"Shallow gives \['flow'\]; of a DARTokenizer features_at"):
        model(pictures())


def test_a_run_trains_with_it_and_leaves_it_behind(weights: Path, tmp_path: Path) -> None:
    content = {
        "out": str(tmp_path / "run"),
        "data": {"name": "digits", "size": 32, "batch_size": 2, "held_out": 1},
        "tokenizer": {
            "class_path": "DARTokenizer",
            "init_args": {
                **{"image_size": 32, "tokens": 4, "groups": 2, "encoder_dim": 16, "encoder_depth": 1, "head_dim": 8},
                **{"code_dim": 16, "code_depth": 1, "flow_dim": 16, "flow_depth": 2, "features_at": 1},
                "quantizer": {"class_path": "EMAVectorQuantizer", "init_args": {"vocab_size": 16, "dim": 4}},
            },
        },
        "alignment": {"class_path": "FeatureAlignment", "init_args": {"hidden": 8, "teacher_weights": str(weights)}},
        "objective": {"l2": 0.0, "terms": {"flow": 1.0, "commitment": 0.25, "alignment": 0.5}},
        "train": {"steps": 2, "log_every": 1, "save_every": 2, "sample_every": 2, "trackers": []},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    config = parse(tokenizer_parser(), ["--config", str(path)])
    with pytest.raises(RunError, match="a prior or an alignment, not both"):
        tokenizer_job({**config, "prior": {"class_path": "LARPPrior", "init_args": {}}})
    assert tokenizer_job(config)
    assert not any("alignment" in name for name in load_file(tmp_path / "run/tokenizer.safetensors"))
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [0 < line["alignment"] < 2 for line in lines if "alignment" in line] == [True, True]
    assert {"held_out_psnr_db_of_2", "held_out_psnr_db_of_4"} <= set().union(*lines)
    assert load_run(tmp_path / "run").tokenizer.prefixes == (2, 4)
