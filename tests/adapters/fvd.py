"""The Fréchet video distance: I3D features, the preprocessing rules, and the distance under both divisors."""

from collections.abc import Callable
from functools import partial
from operator import methodcaller

import torch
from torch import Tensor

from eval.clips import fit_shorter_side, to_network_input
from eval.frechet import FeatureStatistics, Gaussian, frechet_distance
from eval.i3d import EPSILONS, I3D, MIXED
from tests.goldens import Case, Check

BRANCHES = ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")


def statistics_of(features: Tensor) -> FeatureStatistics:
    """Gathered in two parts that are then added up."""
    whole, part = FeatureStatistics(features.shape[1]), FeatureStatistics(features.shape[1])
    third = len(features) // 3
    whole.update(features[:third])
    part.update(features[third:])
    whole.merge(part)
    return whole


def feature_stats(case: Case, check: Check) -> dict[str, Tensor]:
    gaussian = statistics_of(check.inputs["features"]).gaussian("n")
    return {"mean": gaussian.mean, "cov": gaussian.cov}


def distance(case: Case, check: Check, gaussian: Callable[[FeatureStatistics], Gaussian]) -> dict[str, Tensor]:
    sides = (gaussian(statistics_of(check.inputs[f"features_{side}"])) for side in ("gen", "real"))
    return {"value": torch.tensor([frechet_distance(*sides)], dtype=torch.float64)}


def i3d_features(case: Case, check: Check) -> dict[str, Tensor]:
    weights = case.weights()

    def width(unit: str) -> int:
        return len(weights[f"{unit}.conv3d.weight"])

    network = I3D(
        classes=case.config["num_classes"],
        stem=(width("Conv3d_1a_7x7"), width("Conv3d_2b_1x1"), width("Conv3d_2c_3x3")),
        mixed={block: tuple(width(f"{block}.{branch}") for branch in BRANCHES) for block in MIXED},
        eps=EPSILONS["videogpt"],
    ).eval()
    network.load_state_dict(weights)
    with torch.inference_mode():
        return {"features": network(to_network_input(check.inputs["videos"], "common-metrics"))["logits"]}


def preprocess(case: Case, check: Check, rule: str) -> dict[str, Tensor]:
    return {"out": to_network_input(check.inputs["videos"], rule, case.config["resolution"])}


def preprocess_antialias(case: Case, check: Check) -> dict[str, Tensor]:
    first = (check.inputs["videos"][:1] * 255).to(torch.uint8)  # frames as they lie in a file
    return {"out": fit_shorter_side(first, case.config["resolution"], antialias=True)[0]}


CALLS: dict[str, Callable[[Case, Check], dict[str, Tensor]]] = {
    "feature_stats": feature_stats,
    "frechet_biased": partial(distance, gaussian=methodcaller("gaussian", "n")),
    "frechet_unbiased": partial(distance, gaussian=FeatureStatistics.gaussian),
    "i3d_features": i3d_features,
    "preprocess_float": partial(preprocess, rule="common-metrics"),
    "preprocess_uint8": partial(preprocess, rule="videogpt"),
    "preprocess_square": partial(preprocess, rule="seed-voken"),
    "preprocess_antialias": preprocess_antialias,
}
