"""The presets: each metric on the network and the numbers it is defined on, one pass for all of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.evaluation import Evaluated, Reference, evaluate, open_reference
from eval.features import FeatureError, FeatureNetwork, NetworkRecord
from eval.frechet import FeatureStatistics, Gaussian, frechet_distance
from eval.inception_score import chunks, equal_splits, inception_scores
from eval.look import Want, look
from eval.manifold import precision_recall, precision_recall_adm
from eval.networks import NETWORKS, pixels_network
from eval.pictures import PictureError, PictureSet, from_tensor
from eval.pixels import UINT8_RULES
from eval.protocol import UNROUNDED, Protocol
from eval.protocols import CLIPS, GENERATION, PICTURES, RECONSTRUCTION
from eval.protocols.adm import ADM
from eval.protocols.llamagen_rfid import LLAMAGEN_RFID
from eval.protocols.mar import MAR
from eval.protocols.seed_voken_rfid import SEED_VOKEN_RFID
from eval.protocols.torch_fidelity import TORCH_FIDELITY
from eval.provenance import Origin
from eval.reconstruction import psnr, ssim
from eval.references import StatisticsCache, save_reference
from eval.score import wanted_of_reference

RNG = torch.Generator().manual_seed(0)
MADE, REAL = (torch.randint(0, 256, (60, 3, 8, 8), generator=RNG, dtype=torch.uint8) for _ in range(2))
WAYS = torch.randn(8 * 8, 12, generator=RNG)


def features(pictures: Tensor) -> dict[str, Tensor]:
    grey = pictures.float().mean(1).flatten(1) / 255
    rows = grey @ WAYS
    return {"2048": rows[:, :8], "spatial": rows[:, 4:], "logits_unbiased": rows}


class Counted:
    """The Inception network's outputs from a matrix, and how many pictures it was shown. published: as if it were it."""

    def __init__(self, published: bool = True) -> None:
        self.pictures = 0
        distance = "fid" if published else "fd_matrix"
        record = NetworkRecord("matrix", "2048", 8, "f" * 64, "none", distance, published)
        self.network = FeatureNetwork(record, torch.device("cpu"), torch.float32, self.extract)

    def extract(self, pictures: Tensor) -> dict[str, Tensor]:
        self.pictures += len(pictures)
        return features(pictures)


def sets() -> tuple[PictureSet, PictureSet]:
    return from_tensor("made", MADE, Origin.unknown()), from_tensor("real", REAL, Origin.unknown())


def scored(*protocols: Protocol, reference: Reference | None = None, published: bool = True) -> Evaluated:
    made, real = sets()
    networks = {"inception/tf1": Counted(published).network}
    return evaluate(protocols, made, reference or Reference(real), networks, batch_size=16)


def values(result: Evaluated) -> dict[str, float]:
    return {f"{one.provenance.protocol.name}/{one.name}": one.value for one in result.scores}


def gaussian(rows: Tensor) -> Gaussian:
    statistics = FeatureStatistics(rows.shape[1])
    statistics.update(rows)
    return statistics.gaussian()


@pytest.mark.parametrize("protocol", [*PICTURES.values(), *CLIPS.values()], ids=lambda it: it.name)
def test_every_preset_is_whole(protocol: Protocol) -> None:
    assert protocol.metrics and protocol.source and protocol.reference
    assert protocol.uint8 in (*UINT8_RULES, UNROUNDED)
    assert set(protocol.networks) <= {*NETWORKS, "classifier"}
    if protocol.arrays:
        assert set(protocol.arrays) & {it for metric in protocol.metrics for it in metric.of_reference}
    assert all(metric.of_samples or metric.of_reference for metric in protocol.metrics)
    assert protocol.reconstructs == any(metric.pairs for metric in protocol.metrics)


def test_presets_bear_the_names_they_are_asked_for_by() -> None:
    assert {it.name for it in GENERATION} >= {"adm", "torch-fidelity", "mar", "pytorch-fid", "clean-fid"}
    assert all(it.name.endswith("rfid") and it.class_sampling is None for it in RECONSTRUCTION)
    assert all(name == it.name for table in (PICTURES, CLIPS) for name, it in table.items())


def test_adm_and_its_kin_are_what_their_evaluators_compute() -> None:
    found = values(scored(ADM, MAR, TORCH_FIDELITY))
    made, real = features(MADE), features(REAL)
    fid = frechet_distance(gaussian(made["2048"]), gaussian(real["2048"]))
    for name in ("adm", "mar", "torch-fidelity"):
        assert found[f"{name}/fid@60"] == pytest.approx(fid, rel=1e-9)
    sfid = frechet_distance(gaussian(made["spatial"]), gaussian(real["spatial"]))
    assert found["adm/sfid@60"] == pytest.approx(sfid, rel=1e-9)
    in_order = inception_scores(made["logits_unbiased"], chunks(60, 5000), torch.float32)
    assert found["adm/is@60"] == pytest.approx(float(in_order.mean()), rel=1e-9)
    order = torch.from_numpy(np.random.RandomState(2020).permutation(60))
    shuffled = inception_scores(made["logits_unbiased"], equal_splits(60, 10, order))
    assert found["mar/is@60"] == found["torch-fidelity/is@60"] == pytest.approx(float(shuffled.mean()), rel=1e-9)
    assert found["mar/is_std@60"] == pytest.approx(float(shuffled.std(correction=0)), rel=1e-9)
    half, full = (measure(made["2048"], real["2048"]) for measure in (precision_recall_adm, precision_recall))
    assert (found["adm/precision@60"], found["adm/recall@60"]) == (half.precision, half.recall)
    assert (found["torch-fidelity/precision@60"], found["torch-fidelity/recall@60"]) == (full.precision, full.recall)


def test_a_network_sees_every_picture_once_however_many_protocols_ask() -> None:
    (made, real), counted = sets(), Counted()
    evaluate([ADM, MAR, TORCH_FIDELITY], made, Reference(real), {"inception/tf1": counted.network}, batch_size=16)
    assert counted.pictures == len(MADE) + len(REAL)


def test_another_network_lends_its_name_to_every_score() -> None:
    names = {one.name for one in scored(ADM, published=False).scores}
    assert names == {
        "fd_matrix@60",
        "fd_spatial_matrix@60",
        "exp_kl_matrix@60",
        "exp_kl_std_matrix@60",
        "precision_matrix@60",
        "recall_matrix@60",
    }


def test_what_so_few_pictures_do_not_allow_is_left_out_with_the_reason() -> None:
    found = scored(TORCH_FIDELITY)
    assert list(found.left_out["torch-fidelity"].values()) == ["60 pictures of made, it needs at least 1000"]
    assert found.record().keys() >= {"fid@60", "left_out", "audit"}
    assert any("left out" in line and "needs at least 1000" in line for line in found.lines())


def test_one_protocol_has_plain_names_and_several_have_their_own() -> None:
    assert "fid@60" in scored(MAR).record()
    assert {"adm/fid@60", "mar/fid@60"} <= scored(ADM, MAR).record().keys()


# ---- reconstruction


def test_pairs_are_scored_as_their_sources_define_them() -> None:
    """Reconstructions as floats: LlamaGen rounds by 127.5 x + 128, SEED-Voken truncates both sides, LPIPS is left out."""
    floats = (REAL.float() / 127.5 - 1 + 0.1 * torch.randn(REAL.shape, generator=RNG)).clamp(-1, 1)
    made = PictureSet("made", 60, lambda size, a, b: iter(floats[a:b].split(size)), Origin.unknown(), floats=True)
    networks = {f"pixels/{name}": pixels_network(name) for name in ("llamagen", "truncated")}
    networks |= {f"inception/{name}": Counted().network for name in ("tf1", "pytorch")}
    result = evaluate(
        [LLAMAGEN_RFID, SEED_VOKEN_RFID],
        made,
        Reference(sets()[1]),
        networks,
        missing={"lpips/alex": "no weights", "lpips/vgg": "no weights"},
        batch_size=16,
    )
    found = values(result)
    llamagen = (127.5 * floats + 128).clamp(0, 255).to(torch.uint8)
    assert found["llamagen-rfid/psnr_db"] == pytest.approx(float(psnr(llamagen, REAL).mean()), rel=1e-9)
    twice = ssim(llamagen, REAL, "uniform7", 510.0)
    assert found["llamagen-rfid/ssim"] == pytest.approx(float(twice.mean()), rel=1e-9)
    cut = [(255 * ((it + 1) / 2)).to(torch.uint8) for it in (floats, REAL.float() / 127.5 - 1)]
    assert (cut[1].int() - REAL.int()).unique().tolist() == [-1, 0]
    assert found["seed-voken-rfid/psnr_db"] == pytest.approx(float(psnr(*cut).mean()), rel=1e-6)
    unrounded = features((floats + 1) * 127.5)["2048"]
    rfid = frechet_distance(gaussian(unrounded), gaussian(features(REAL)["2048"]))
    assert found["seed-voken-rfid/rfid@60"] == pytest.approx(rfid, rel=1e-5)
    assert set(result.left_out["seed-voken-rfid"].values()) == {"no weights"}


# ---- references


def arrays() -> dict[str, np.ndarray]:
    whole = {"mu": features(REAL)["2048"], "mu_s": features(REAL)["spatial"]}
    found = {name: gaussian(rows) for name, rows in whole.items()}
    means = {name: side.mean.float().numpy() for name, side in found.items()}
    return means | {name.replace("mu", "sigma"): side.cov.numpy() for name, side in found.items()}


def test_published_statistics_stand_for_the_pictures(tmp_path: Path) -> None:
    """ADM's file: distances from its statistics, precision and recall from its pictures, which have no part in the rest."""
    path = tmp_path / "VIRTUAL.npz"
    np.savez(path, arr_0=REAL[:20].movedim(1, -1).numpy(), **arrays())
    found = scored(ADM, MAR, reference=open_reference(path))
    against_pictures, few = (
        values(scored(ADM)),
        values(scored(ADM, reference=Reference(from_tensor("few", REAL[:20], Origin.unknown())))),
    )
    numbers = values(found)
    for name in ("fid", "sfid"):
        assert numbers[f"adm/{name}@60"] == pytest.approx(against_pictures[f"adm/{name}@60"], rel=1e-6)
    assert numbers["mar/fid@60"] == numbers["adm/fid@60"]
    for name in ("precision", "recall"):
        assert numbers[f"adm/{name}@60"] == few[f"adm/{name}@60"]
    record = found.scores[0].provenance.reference
    assert record.count == "not recorded" and "taken to be inception/tf1" in str(record.origin.record)
    np.savez(path, **{name: array for name, array in arrays().items() if "_s" not in name})
    statistics_alone = scored(MAR, reference=open_reference(path))
    assert values(statistics_alone)["mar/fid@60"] == numbers["mar/fid@60"]


@pytest.mark.parametrize(
    ("change", "protocol", "fault"),
    [
        ({}, TORCH_FIDELITY, r"holds the statistics \(mu, sigma\).*protocol torch-fidelity compares with pictures"),
        ({"sigma": None}, MAR, "has no array sigma, which protocol mar needs; it holds .*mu"),
        (
            {"mu": np.zeros(5), "sigma": np.eye(5)},
            MAR,
            "is of 5 features, matrix has 8: the statistics of another network",
        ),
        ({"sigma": np.eye(7)}, MAR, r"mu \(8,\), sigma \(7, 7\); a mean \(d,\) and a covariance"),
        ({"mu": np.full(8, np.nan)}, MAR, "array mu must hold finite floats"),
        ({"mu": np.zeros(8, np.int64)}, MAR, "array mu must hold finite floats, it is int64"),
    ],
)
def test_statistics_that_do_not_serve(
    change: dict[str, np.ndarray | None], protocol: Protocol, fault: str, tmp_path: Path
) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, **{name: array for name, array in (arrays() | change).items() if array is not None})
    with pytest.raises(PictureError, match=fault) as caught:
        scored(protocol, reference=open_reference(path))
    assert str(path) in str(caught.value)


def test_statistics_of_the_published_network_are_not_held_against_another(tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", **arrays())
    with pytest.raises(FeatureError, match=r"stats\.npz: its statistics are of the published network.*matrix"):
        scored(MAR, reference=open_reference(tmp_path / "stats.npz"), published=False)


def made_reference(
    path: Path, *protocols: Protocol, network: FeatureNetwork | None = None, real: Tensor = REAL
) -> Path:
    pictures = from_tensor("real", real, Origin.unknown())
    seen = look(pictures, wanted_of_reference(protocols, pictures), {"inception/tf1": network or Counted().network}, 16)
    save_reference(path, seen, [it.name for it in protocols])
    return path


def test_a_reference_file_stands_for_the_pictures(tmp_path: Path) -> None:
    path = made_reference(tmp_path / "real.safetensors", ADM, TORCH_FIDELITY)
    found = scored(ADM, TORCH_FIDELITY, MAR, reference=open_reference(path))
    wanted = scored(ADM, TORCH_FIDELITY, MAR)
    assert values(found) == values(wanted)
    assert found.scores[0].provenance.reference == wanted.scores[0].provenance.reference


def test_a_reference_of_another_kind_is_an_error_that_names_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "real.safetensors"
    cure = r"make it again by scripts/make_reference\.py --protocol NAME --out .*real\.safetensors"
    reference = open_reference(made_reference(path, MAR))
    with pytest.raises(PictureError, match=rf"(?s)was made for mar and holds .*needs .*spatial.*{cure}"):
        scored(ADM, reference=reference)
    other = Counted().network
    made_reference(path, MAR, network=replace(other, record=replace(other.record, preprocessing="bicubic")))
    with pytest.raises(FeatureError, match=rf"another network .*\(preprocessing: bicubic / none\); {cure}"):
        scored(MAR, reference=reference)
    made_reference(path, MAR, real=REAL.reshape(60, 3, 4, 16))
    with pytest.raises(PictureError, match="made is 8x8, real is 4x16; bring both to one size"):
        scored(MAR, reference=reference)
    content = made_reference(path, MAR).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(PictureError, match=f"not a whole reference file .*{cure}"):
        scored(MAR, reference=reference)


def test_a_cache_goes_by_content(tmp_path: Path) -> None:
    """A set under another name is known again; the same name with one other pixel, or another network, is not."""
    cache = StatisticsCache(tmp_path)

    def shown(name: str, pictures: Tensor, weights: str = "f") -> tuple[int, float]:
        counted = Counted()
        network = replace(counted.network, record=replace(counted.network.record, weights_sha256=weights * 64))
        reference = Reference(from_tensor(name, pictures, Origin.unknown()))
        result = evaluate([MAR], sets()[0], reference, {"inception/tf1": network}, batch_size=16, cache=cache)
        assert result.scores[0].provenance.reference.name == name
        return counted.pictures - len(MADE), result.scores[0].value

    seen, first = shown("real", REAL)
    assert seen == 60
    assert shown("another name", REAL) == (0, first)
    changed = REAL.clone()
    changed[3, 0, 0, 0] += 1
    seen, other = shown("real", changed)
    assert seen == 60 and other != first
    assert shown("real", REAL, weights="0")[0] == 60


def test_wants_are_known_by_what_they_say() -> None:
    wants = [Want("inception/tf1", it) for metric in ADM.metrics for it in metric.of_reference]
    again = [Want("inception/tf1", it) for metric in TORCH_FIDELITY.metrics for it in metric.of_reference]
    assert len({*wants, *again}) == 3  # two Gaussians, one set of rows
