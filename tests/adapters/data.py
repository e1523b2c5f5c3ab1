"""Numeric cases of the crops: uint8 pictures in, uint8 crops out."""

from collections.abc import Callable

import torch
from torch import Tensor

from data.crops import center_crop_arr, random_crop_arr, ten_crop, var_center_crop
from tests.goldens import Case, Check


def _center(case: Case, check: Check) -> dict[str, Tensor]:
    return {"image": torch.tensor(center_crop_arr(check.inputs["image"].numpy(), check.params["size"]))}


def _random(case: Case, check: Check) -> dict[str, Tensor]:
    crop = random_crop_arr(
        check.inputs["image"].numpy(),
        check.params["size"],
        draws=tuple(check.inputs["draws"].tolist()),
        min_frac=check.params["min_crop_frac"],
        max_frac=check.params["max_crop_frac"],
    )
    return {"image": torch.tensor(crop)}


def _ten(case: Case, check: Check) -> dict[str, Tensor]:
    crops = ten_crop(check.inputs["image"].numpy(), check.params["size"], check.params["crop_range"])
    return {"images": torch.tensor(crops)}


def _var_center(case: Case, check: Check) -> dict[str, Tensor]:
    return {"image": torch.tensor(var_center_crop(check.inputs["image"].numpy(), check.params["size"]))}


CALLS: dict[str, Callable[[Case, Check], dict[str, Tensor]]] = {
    "center_crop_arr": _center,
    "random_crop_arr": _random,
    "ten_crop": _ten,
    "var_center_crop": _var_center,
}
