"""Scores of clips: what a protocol for them says beyond one for pictures, and the networks of FVD.

Source: Unterthiner et al. 2018 (arXiv:1812.01717). A number of it belongs to a variant of the I3D network, a rule of
preprocessing, a choice of clips on both sides, a divisor of the covariance and a number of clips; presets in
`eval.protocols` name them all.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from eval.clip_sets import Cut, VideoSet, clips_of, frames_of, halves
from eval.clips import CLIP_RULES, Place
from eval.features import FeatureNetwork
from eval.i3d import LEAST_FRAMES, i3d_network
from eval.pictures import PictureError, PictureSet
from eval.protocol import Protocol


@dataclass(frozen=True, eq=False, kw_only=True)
class ClipProtocol(Protocol):
    """A protocol whose samples and reference are videos.

    made, cut: the clips of samples and of the reference. fit: key of `eval.clip_sets.FITS`, by which videos of the
    reference come to the size of the samples; None: they must have it. single_frames: the networks see every frame of
    the clips as a picture.
    """

    made: Cut
    cut: Cut
    fit: str | None = None
    single_frames: bool = False

    def samples(self, videos: VideoSet) -> PictureSet:
        """The set that the networks see of generated videos. Raises PictureError where one does not fit the protocol."""
        return self._seen(videos, self.made(videos), None, str(self.made))

    def of_model(self, clips: PictureSet, frames: int) -> PictureSet:
        """The set that the networks see of clips that a model makes now, `frames` frames each. Raises as `samples`."""
        kept = self.made.of_sample(clips.name, frames)
        self._check_length(clips.name, len(kept))

        def read(size: int, start: int, stop: int) -> Iterator[Tensor]:
            return (batch[:, :, kept.start : kept.stop : kept.step] for batch in clips.batches(size, start, stop))

        chosen = replace(clips, read=read)
        return frames_of(chosen) if self.single_frames else chosen

    def real(self, videos: VideoSet, size: int | None) -> PictureSet:
        """The set that the networks see of real videos. size: side of the samples; None where these are not square."""
        return self._seen(videos, self.cut(videos), size, str(self.cut))

    def real_halves(self, videos: VideoSet, size: int | None, seed: int = 0) -> tuple[PictureSet, PictureSet]:
        """Two sets of real clips, equally many, without a common video: their score is the floor of the real set.

        It is made on half as many clips, so it is the floor of scores of that number. Raises PictureError for one video.
        """
        first, second = halves(videos, self.cut(videos), seed)
        return (
            self._seen(videos, first, size, f"half 1 of {self.cut}, by videos, seed {seed}"),
            self._seen(videos, second, size, f"half 2 of {self.cut}, by videos, seed {seed}"),
        )

    def floor(self) -> "ClipProtocol":
        """The protocol of such halves, whose clips nobody made."""
        return replace(self, name=f"{self.name}-floor", count=None, class_sampling=None)

    def _seen(self, videos: VideoSet, places: Sequence[Place], size: int | None, cut: str) -> PictureSet:
        for place in places:
            self._check_length(videos.names[place.video], len(place.frames))
        clips = clips_of(videos, places, size, self.fit, cut)
        return frames_of(clips) if self.single_frames else clips

    def _check_length(self, name: str, frames: int) -> None:
        if not self.single_frames and frames < LEAST_FRAMES:
            raise PictureError(
                f"{name}: has {frames} frames, the network of FVD takes at least {LEAST_FRAMES}; give longer videos, or "
                "score single frames with --protocol frame-fid"
            )


def _i3d(variant: str, rule: str, weights: Mapping[str, Path], device: torch.device | str) -> FeatureNetwork:
    """Floats come as grey levels in [0, 255], as to every network of `eval.networks`."""
    network = i3d_network(weights.get("i3d"), variant, rule, device)

    def extract(clips: Tensor) -> Mapping[str, Tensor]:
        return network.extract(clips / 255 if clips.is_floating_point() else clips)

    return replace(network, extract=extract)


NETWORKS = {  # as in `eval.networks`: how each is made of weights files and a device
    f"{name}/{rule}": partial(_i3d, variant, rule)
    for name, variant in (("i3d", "tensorflow"), ("i3d-videogpt", "videogpt"))
    for rule in CLIP_RULES
}
