"""scripts/demo_video.py on a few clips with almost no training: every part runs, is measured, plays, is not done twice."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data import moving_digits
from eval.features import FeatureNetwork, NetworkRecord
from eval.i3d import LAYER
from tests.goldens import ROOT
from training.run import load_run

ORDERS = {"next_token": 160, "next_neighbour": 16}  # and their rounds
SETS = ("other real", "reconstructions", *ORDERS)
CLIPS = 20


def blind(name: str) -> FeatureNetwork:
    """In the place of I3D, which takes seconds a clip: the mean brightness of frames."""
    record = NetworkRecord("brightness", LAYER, 10, "none", "none", "fvd", False)

    def extract(clips: Tensor) -> dict[str, Tensor]:
        return {LAYER: clips.float().mean((1, 3, 4))}

    return FeatureNetwork(record, torch.device("cpu"), torch.float32, extract)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        import demo_video

        patch.setitem(moving_digits.COUNTS, "train", 60)
        patch.setitem(moving_digits.COUNTS, "val", 2 * CLIPS)
        patch.setattr(demo_video, "open_network", blind)
        folder = tmp_path_factory.mktemp("demo") / "video"
        demo_video.demo_video(folder, share=0.0001, clips=CLIPS, fvd_clips=CLIPS)
        yield folder
        del sys.modules["demo_video"], sys.modules["stages"]


def test_every_score_is_measured_and_carries_its_protocol(out: Path) -> None:
    metrics = json.loads((out / "metrics.json").read_text())
    distances = {f"{name}/common-metrics/fvd@{CLIPS}" for name in SETS}
    accuracies = {f"{name}/frame_label_accuracy" for name in ("real", *SETS)}
    plain = {f"{name}_{it}" for name in ("reconstruction", "black") for it in ("psnr_db", "ssim")}
    found = metrics["provenance"].keys()
    assert found > distances | accuracies | plain
    assert all(math.isfinite(metrics[name]) for name in found)
    for name in distances:
        provenance = metrics["provenance"][name]["provenance"]
        assert provenance["protocol"]["name"] == "common-metrics"
        assert provenance["reference"]["name"] == f"moving_digit val 0 .. {CLIPS - 1}"
    assert metrics["motion"].keys() == set(SETS)
    for tests in metrics["motion"].values():
        assert all(
            0 <= found["ks"] <= 1 and 0 <= found["p"] <= 1 and found["clips"] == CLIPS for found in tests.values()
        )
    assert {order: found["rounds"] for order, found in metrics["sampling"].items()} == ORDERS


def test_the_clips_play_in_a_page_that_stands_alone(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert page.count("data:image/gif;base64,") == 1 + 10 * len(ORDERS)  # reconstructions, and a row a class and order
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    for order in ORDERS:
        assert load_run(out / order).generator.spec.decoded == (10, 32, 32)
        assert (out / f"films/{order}.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_demo_is_left_alone_and_a_stopped_one_goes_on(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo_video = sys.modules["demo_video"]
    trained = [out / kind / "log.jsonl" for kind in ("tokenizer", *ORDERS)] + [out / "classifier.safetensors"]
    kept = {path: path.read_bytes() for path in trained}
    before = json.loads((out / "metrics.json").read_text())
    demo_video.demo_video(out)
    assert "finished already" in capsys.readouterr().out
    (out / "metrics.json").unlink()  # as if it had been stopped before the last file
    demo_video.demo_video(out, share=0.0001, clips=CLIPS, fvd_clips=CLIPS)
    assert {path: path.read_bytes() for path in trained} == kept
    again = json.loads((out / "metrics.json").read_text())
    assert {name: again[name] for name in before["provenance"]} == {name: before[name] for name in before["provenance"]}
