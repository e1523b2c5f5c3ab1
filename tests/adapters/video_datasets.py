"""Numeric cases of clips: which frames of which videos, in which order, and how frames become squares in [0, 1]."""

from collections.abc import Callable

import torch
from torch import Tensor

from data.clips import center_clip, first, index_all_clips, sample_order
from tests.goldens import Case, Check


def _index_all_clips(case: Case, check: Check) -> dict[str, Tensor]:
    rows = torch.from_numpy(index_all_clips(check.inputs["lengths"].numpy(), case.config["frame_num"]))
    return {"index_map": rows, "labels": check.inputs["video_labels"][rows[:, 0]]}


def _sample_order(case: Case, check: Check) -> dict[str, Tensor]:
    clips, count = len(check.inputs["index_map"]), len(check.outputs["order"])
    return {"order": torch.tensor(sample_order(clips, count, case.config["split_seed"]))}


def _transform(case: Case, check: Check) -> dict[str, Tensor]:
    frames = check.inputs["frames"].numpy()
    taken = first(len(frames), max(len(frames), case.config["frame_num"]))  # the last one again where there are too few
    return {"clip": center_clip(frames[taken], case.config["crop_size"])}


CALLS: dict[str, Callable[[Case, Check], dict[str, Tensor]]] = {
    "index_all_clips": _index_all_clips,
    "sample_order": _sample_order,
    "transform": _transform,
}
