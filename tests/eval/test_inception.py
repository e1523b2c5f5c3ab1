"""The FID network: its features, and every way in which its weights can fail to be the right ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from eval import inception
from eval.features import FeatureError
from eval.files import sha256_of
from eval.inception import PREPROCESSING, inception_features, inception_network, load_inception
from eval.weights import SOURCES
from tests.torchscript import write_torchscript


def pictures(count: int, size: int = 32) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=rng, dtype=torch.uint8)


def test_features_are_those_of_torch_fidelity(inception_file: Path) -> None:
    """Our loading and its loading of the same file agree on every feature, and so do batches of one and of three."""
    network = inception_network(inception_file)
    theirs = FeatureExtractorInceptionV3("reference", ["2048"], feature_extractor_weights_path=str(inception_file))
    batch = pictures(3)
    with torch.inference_mode():
        features = network.extract(batch)["2048"]
        assert_close(features, theirs(batch)[0], atol=1e-5, rtol=1e-5)  # batch norms are folded: another order of sums
        assert_close(network.extract(batch[:1])["2048"], features[:1], atol=1e-5, rtol=1e-5)
    assert features.shape == (3, 2048) and features.dtype == torch.float32
    assert features.isfinite().all() and features.std(0).max() > 0


def test_pictures_are_resized_as_tensorflow_1_does(inception_file: Path) -> None:
    """Source place = place * 32 / 299 without the half-pixel shift: a picture resized so by hand gives the same."""
    network = inception_network(inception_file)
    batch = torch.arange(32, dtype=torch.uint8).mul(8).expand(1, 3, 32, 32).contiguous()  # a ramp from left to right
    place = torch.arange(299) * (32 / 299)
    left, share = place.floor().long(), place - place.floor()
    row = (
        batch[0, 0, 0].float()[left] * (1 - share) + batch[0, 0, 0].float()[(left + 1).clamp_max(31)] * share
    ).round()
    by_hand = row.to(torch.uint8).expand(1, 3, 299, 299).contiguous()
    half_pixel = F.interpolate(batch.float(), (299, 299), mode="bilinear", antialias=True).round().to(torch.uint8)
    with torch.inference_mode():
        ours, same, other = (network.extract(it)["2048"] for it in (batch, by_hand, half_pixel))
    assert (ours - same).norm() < 0.2 * (ours - other).norm()


def test_every_layer_is_that_of_torch_fidelity(inception_file: Path) -> None:
    names = ["64", "192", "768", "2048", "logits_unbiased", "logits"]
    theirs = FeatureExtractorInceptionV3("reference", names, feature_extractor_weights_path=str(inception_file))
    with torch.inference_mode():
        ours = inception_features(load_inception(inception_file), pictures(2))
        for name, wanted in zip(names, theirs(pictures(2)), strict=True):
            assert_close(ours[name], wanted, atol=1e-5, rtol=1e-5)
    assert ours["spatial"].shape == (2, 2023)


def test_a_batch_is_cut_into_chunks_and_joined_in_order(inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, batch = inception_network(inception_file), pictures(3)
    with torch.inference_mode():
        whole = network.extract(batch)
        monkeypatch.setattr(inception, "CHUNK", 2)
        for name, features in network.extract(batch).items():
            assert_close(features, whole[name], atol=1e-5, rtol=1e-5)


def test_spatial_features_are_the_first_channels_of_one_branch(inception_file: Path) -> None:
    """The published node is the output of the 1x1 branch of Mixed_6d, which comes first in the joined channels."""
    model, kept = load_inception(inception_file), []
    model.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.inference_mode():
        spatial = inception_features(model, pictures(2))["spatial"]
    assert torch.equal(spatial.view(2, 17, 17, 7), kept[0][:, :7].movedim(1, -1))


def test_preprocessings_differ_and_say_so(inception_file: Path) -> None:
    batch, seen = pictures(2), {}
    for name in PREPROCESSING:
        network = inception_network(inception_file, preprocessing=name)
        with torch.inference_mode():
            seen[network.record.preprocessing] = network.extract(batch)["2048"]
    assert list(seen) == list(PREPROCESSING.values())
    tf1, torch_bilinear, clean = seen.values()
    for a, b in ((tf1, torch_bilinear), (tf1, clean), (torch_bilinear, clean)):
        assert (a - b).norm() > 1e-3 * a.norm()
    with pytest.raises(FeatureError, match="unknown preprocessing 'lanczos'; known: tf1, pytorch, clean"):
        inception_network(inception_file, preprocessing="lanczos")


def test_pictures_of_the_networks_size_are_scaled_alone(inception_file: Path) -> None:
    """At 299 x 299 no rule resizes, and "pytorch" centres half a level lower than the other two."""
    model, batch = load_inception(inception_file), pictures(1, 299)
    with torch.inference_mode():
        tf1, torch_bilinear, clean = (inception_features(model, batch, name)["2048"] for name in PREPROCESSING)
    assert_close(clean, tf1, atol=1e-4, rtol=1e-4)
    assert 0 < (torch_bilinear - tf1).norm() < 0.05 * tf1.norm()


def test_unpublished_weights_never_make_an_fid(inception_file: Path) -> None:
    record = inception_network(inception_file).record
    assert record.weights_sha256 == sha256_of(inception_file)
    assert record.distance == "frechet_unpublished_inception_distance"
    assert "unpublished" in record.name and not record.comparable_to_papers


def test_the_published_checksum_makes_an_fid(inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = replace(SOURCES["inception"], sha256=sha256_of(inception_file)[:8])
    monkeypatch.setitem(SOURCES, "inception", source)
    record = inception_network(inception_file, strict=True).record
    assert record.distance == "fid" and record.comparable_to_papers


def test_other_weights_are_an_error_where_that_is_asked_for(inception_file: Path) -> None:
    with pytest.raises(FeatureError, match=r"random\.pth: sha256 .*…, the published weights have 6726825d…"):
        inception_network(inception_file, strict=True)


def test_a_torchscript_archive_holds_the_same_network(
    inception_state: dict[str, Tensor], inception_file: Path, tmp_path: Path
) -> None:
    """Its program is not run: the one of this file does nothing."""
    write_torchscript(inception_state, tmp_path / "weights.pt")
    wanted, found = load_inception(inception_file).state_dict(), load_inception(tmp_path / "weights.pt").state_dict()
    assert len(found) == len(wanted)
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("exploded"),)


def test_files_that_are_not_these_weights(
    inception_state: dict[str, Tensor], inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = inception_file.read_bytes()
    (tmp_path / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.pth").write_text("<!doctype html> not found")
    torch.save({"weights": Bomb()}, tmp_path / "code.pth")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    torch.save(inception_state | {"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.pth")
    faults = {
        "missing.pth": "no such weights file",
        "truncated.pth": "not a readable file of tensors",
        "page.pth": "not a readable file of tensors",
        "code.pth": "not a readable file of tensors",
        "list.pth": "holds no flat dict of tensors",
        "torchvision.pth": r"not the weights of the FID network: 566 tensors and 1000 classes[\s\S]*not comparable to any FID",
    }
    for name, fault in faults.items():
        with pytest.raises(FeatureError, match=fault) as caught:
            inception_network(tmp_path / name)
        assert name in str(caught.value) and "--metric-weights inception=FILE" in str(caught.value)
    assert not (tmp_path / "exploded").exists()
