"""The small classifier: it learns, it is a function of its seed, it survives being saved, and it knows its place."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Generator, Tensor
from torch.testing import assert_close

from data.loader import evaluation_batches
from data.sets import open_set
from eval.classifier import Classifier, bend, load_classifier, train_classifier
from eval.features import FeatureError
from eval.pixels import from_uint8, to_uint8


def stripes(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four classes that differ in direction and width of stripes, in noise."""
    rng = Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    place = torch.arange(16).float()
    waves = torch.stack([torch.sin(place * speed) for speed in (0.8, 2.0)])
    patterns = torch.cat((waves[:, None, :].expand(2, 16, 16), waves[:, :, None].expand(2, 16, 16)))
    images = 0.6 * patterns[labels][:, None].expand(-1, 3, -1, -1)
    return (images + 0.3 * torch.randn(count, 3, 16, 16, generator=rng)).clamp(-1, 1), labels


@pytest.fixture(scope="module")
def trained() -> Classifier:
    return train_classifier(*stripes(400), num_classes=4, seed=0, steps=60)


def test_it_learns_to_tell_classes_apart(trained: Classifier) -> None:
    assert trained.accuracy(*stripes(200, seed=1)) > 0.97
    shuffled = torch.randint(0, 4, (200,), generator=Generator().manual_seed(0))
    assert trained.accuracy(stripes(200, seed=1)[0], shuffled) < 0.4


def test_digits_in_a_third_of_the_full_training() -> None:
    """The full training reaches 98 %."""
    sets = [open_set("digits", split=split) for split in ("train", "val")]
    train, held_out = (next(evaluation_batches(pictures, len(pictures))) for pictures in sets)
    classifier = train_classifier(train["image"], train["label"], 10, seed=0, steps=330)
    assert classifier.accuracy(held_out["image"], held_out["label"]) > 0.96


def test_the_seed_decides_and_the_process_has_no_part(trained: Classifier) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = train_classifier(*stripes(400), num_classes=4, seed=0, steps=60)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.network().record == trained.network().record
    other = train_classifier(*stripes(400), num_classes=4, seed=1, steps=60)
    assert other.network().record.weights_sha256 != trained.network().record.weights_sha256


def test_features_and_logits(trained: Classifier) -> None:
    network = trained.network()
    images = from_uint8(to_uint8(stripes(40, seed=2)[0]))
    with torch.inference_mode():
        outputs = network.extract(to_uint8(images))
        assert torch.equal(outputs["penultimate"], trained.features(images))
        assert torch.equal(outputs["logits"], trained(images))
        assert_close(trained.features(images[:1]), outputs["penultimate"][:1], atol=1e-5, rtol=1e-5)
    assert outputs["penultimate"].shape == (40, network.record.dim)
    assert network.record.distance == "frechet_classifier_distance" and not network.record.comparable_to_papers


def test_saved_and_loaded(trained: Classifier, tmp_path: Path) -> None:
    trained.save(tmp_path / "classifier.safetensors")
    loaded = load_classifier(tmp_path / "classifier.safetensors")
    images = stripes(20, seed=3)[0]
    assert not loaded.training
    assert torch.equal(loaded(images), trained(images))
    assert loaded.network().record == trained.network().record


def test_files_that_hold_no_classifier(trained: Classifier, tmp_path: Path) -> None:
    trained.save(tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "keys.safetensors", {"classifier": '{"num_classes": 4}'})
    faults = {"truncated": "not a readable", "other": "holds no classifier", "keys": "not a readable", "none": "not a"}
    for name, fault in faults.items():
        with pytest.raises(FeatureError, match=rf"{name}\.safetensors: {fault}"):
            load_classifier(tmp_path / f"{name}.safetensors")


def test_bending_moves_each_picture_in_its_own_way_and_not_far() -> None:
    ramp = torch.linspace(-1, 1, 32)
    images = torch.stack((ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.zeros(32, 32)))
    images = images.expand(64, -1, -1, -1)  # across, down and nothing: a picture of its own coordinates
    bent = bend(images, Generator().manual_seed(0))
    moved = (bent - images)[:, :2, 8:24, 8:24]
    assert moved.abs().mean((1, 2, 3)).min() > 0.005
    assert moved.abs().max() < 0.7
    assert bent.std(0).max() > 0.05
    assert not bent[:, 2].any()


def test_labels_and_pixels_that_cannot_be_learned() -> None:
    images, labels = stripes(8)
    with pytest.raises(ValueError, match="8 pictures, 7 labels"):
        train_classifier(images, labels[:7], 4)
    with pytest.raises(ValueError, match=r"labels 0 \.\. 3 for 3 classes"):
        train_classifier(images, labels, 3)
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        train_classifier(images * float("nan"), labels, 4, steps=2)
