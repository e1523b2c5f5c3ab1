"""The page from one look at both sides: what it asks for is what it shows."""

import pytest
import torch
from torch import Tensor

from eval.audit import Audit
from eval.features import FeatureNetwork, NetworkRecord
from eval.look import look
from eval.page import all_intervals, evaluation_page, wanted_for_page
from eval.pictures import PictureSet, from_tensor
from eval.pixels import from_uint8
from eval.protocols.classifier import CLASSIFIER
from eval.provenance import Origin
from eval.score import score, wanted_of_reference, wanted_of_samples

RECORD = NetworkRecord("means", "penultimate", 12, "f" * 64, "none", "fd_classifier", False)


def extract(pictures: Tensor) -> dict[str, Tensor]:
    levels = torch.tensor([126.0, 127.0, 128.0, 129.0])
    mean = pictures.float().mean((1, 2, 3))
    return {"penultimate": pictures.float().mean((1, 3)), "logits": -(mean[:, None] - levels).abs()}


NETWORKS = {"classifier": FeatureNetwork(RECORD, torch.device("cpu"), torch.float32, extract)}


def images(count: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 12, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("floats", [False, True])
def test_sections_follow_what_is_known(floats: bool) -> None:
    ours, theirs = images(60, 0), images(80, 1)
    ours[7] = theirs[33]
    labels = torch.arange(60) % 4

    def read(size: int, start: int, stop: int) -> object:
        return iter(from_uint8(ours[start:stop]).split(size))

    samples = from_tensor("made", ours, Origin.unknown(), labels)
    if floats:
        samples = PictureSet("made", 60, read, Origin.unknown(), labels, floats=True)
    real = from_tensor("real", theirs, Origin.unknown(), torch.arange(80) % 4)
    more, bank = wanted_for_page([CLASSIFIER], samples, real, NETWORKS)
    audit = Audit("made")
    seen = look(samples, [*wanted_of_samples([CLASSIFIER], samples), *more], NETWORKS, 32, audit=audit)
    reference = look(real, [*wanted_of_reference([CLASSIFIER], real), *bank], NETWORKS, 32)
    scores = score(CLASSIFIER, seen, reference).scores
    intervals = all_intervals([CLASSIFIER], scores, seen, reference)
    assert len(intervals) == 2
    page = evaluation_page("Made", scores, intervals, {"samples": audit}, samples, real, seen, reference)
    assert [section["title"] for section in page.sections] == [
        "Scores",
        "For a paper's table",
        "Audit",
        "Samples by class",
        "Nearest pictures of real",
        "Samples recognised as their class",
    ]
    assert page.sections[4]["rows"][0][0] == "sample 7"
    assert page.sections[4]["rows"][0][1][1][1] == "0 (no. 33)"
    assert sum(len(figures) for _, figures in page.sections[3]["rows"]) == 4 * 8
    right = round(next(it.value for it in scores if it.name.startswith("label_accuracy")) * 60)
    table = page.sections[5]["cells"]
    assert sum(round(int(cells[1][1]) * float(cells[2][1])) for cells in table) == right
    bare = look(samples, wanted_of_samples([CLASSIFIER], samples), NETWORKS, 32)
    page = evaluation_page("Made", scores, {}, {}, samples, None, bare, reference)
    assert [section["title"] for section in page.sections] == ["Scores", "For a paper's table", "Samples by class"]
