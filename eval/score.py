"""From pictures to scores: features, then statistics, then values, each reachable by itself.

A set of pictures is looked at once and may then be compared with any other that the same network has seen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from eval.audit import Audit
from eval.features import FeatureError, FeatureNetwork, NetworkRecord
from eval.frechet import FeatureStatistics, Gaussian, frechet_distance
from eval.pictures import PictureError, PictureSet, PixelDigest
from eval.provenance import Computation, PicturesRecord, Provenance, Score, library_versions

FRECHET = "Fréchet distance of Gaussians, covariance divisor n - 1"
LABEL_ACCURACY = "share of pictures that the network assigns to the class they were made for"


@dataclass(frozen=True)
class Seen:
    """What a network saw in a set of pictures. right: how many it assigned to their label; None without labels."""

    network: NetworkRecord
    pictures: PicturesRecord
    gaussian: Gaussian
    right: int | None
    computation: Computation


@torch.inference_mode()
def look(network: FeatureNetwork, pictures: PictureSet, batch_size: int = 64, audit: Audit | None = None) -> Seen:
    """Run all pictures through the network, keeping sums only. audit: is shown the same pictures and labels.

    Raises PictureError where the set does not hold what it says, or less than two pictures, or labels that are none of
    the network's classes.
    """
    statistics = FeatureStatistics(network.record.dim, network.device)
    digest, right = PixelDigest(pictures.name), None
    with (
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        tqdm(total=pictures.count, desc=pictures.name, unit="picture", disable=None, leave=False) as bar,
    ):
        for batch in pictures.batches(batch_size):
            first = digest.count
            digest.update(batch)
            outputs = network.extract(batch.to(network.device))
            statistics.update(outputs[network.record.layer])
            labels = None if pictures.labels is None else pictures.labels[first : digest.count]
            if labels is not None and "logits" in outputs:
                right = (right or 0) + _count_right(pictures.name, outputs["logits"], labels, first)
            if audit is not None:
                audit.update(batch, labels)
            bar.update(len(batch))
    if digest.count != pictures.count:
        raise PictureError(f"{pictures.name}: said to hold {pictures.count} pictures, gave {digest.count}")
    if digest.count < 2:
        raise PictureError(f"{pictures.name}: holds {digest.count} pictures, a covariance needs at least 2")
    dtype = str(network.dtype).removeprefix("torch.")
    computation = Computation(str(network.device), dtype, batch_size, library_versions())
    record = digest.record(pictures.origin)
    return Seen(network.record, record, statistics.gaussian(), right, computation)


def frechet_score(samples: Seen, reference: Seen) -> Score:
    """The Fréchet distance under the network's own name for it and the number of samples, like "fid@50000".

    Raises FeatureError where the two were seen by different networks, PictureError where their sizes differ.
    """
    ours, theirs = samples.pictures, reference.pictures
    if samples.network != reference.network:
        pairs = zip(vars(samples.network).items(), vars(reference.network).values(), strict=True)
        differ = "; ".join(f"{field}: {here} / {there}" for (field, here), there in pairs if here != there)
        raise FeatureError(
            f"{ours.name} and {theirs.name} were seen by different networks ({differ}); look at both with one"
        )
    if (ours.height, ours.width) != (theirs.height, theirs.width):
        raise PictureError(
            f"{ours.name} is {ours.height}x{ours.width}, {theirs.name} is {theirs.height}x{theirs.width}; "
            "bring both to one size by a stated rule first"
        )
    provenance = Provenance(FRECHET, samples.network, ours, theirs, samples.computation)
    value = frechet_distance(samples.gaussian, reference.gaussian)
    return Score(f"{samples.network.distance}@{ours.count}", value, provenance)


def accuracy_score(samples: Seen, name: str = "label_accuracy") -> Score:
    """Label accuracy of samples, or, on held-out real pictures, the accuracy of the classifier itself.

    Raises FeatureError where there are no labels, or the network does not know them.
    """
    if samples.right is None:
        raise FeatureError(
            f"{samples.pictures.name}: no label accuracy; it needs labels, and a network with logits over them"
        )
    provenance = Provenance(LABEL_ACCURACY, samples.network, samples.pictures, None, samples.computation)
    return Score(name, samples.right / samples.pictures.count, provenance)


def _count_right(name: str, logits: Tensor, labels: Tensor, first: int) -> int:
    outside = (labels < 0) | (labels >= logits.shape[1])
    if outside.any():
        place = int(outside.nonzero()[0])
        raise PictureError(
            f"{name}: picture {first + place} has label {int(labels[place])}, the network knows {logits.shape[1]} classes"
        )
    return int((logits.argmax(1) == labels.to(logits.device)).sum())
