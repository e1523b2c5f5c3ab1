"""Metrics that several protocols share, each a function of the network and the output it is made on."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from torch import Tensor

from eval.frechet import frechet_distance
from eval.gather import Mean, Moments, Right, Rows, Splits
from eval.kernel import cmmd, draw_subsets, kid
from eval.manifold import Overlap, density_coverage, precision_recall
from eval.protocol import Metric, Side

SEED = 2020  # of torch-fidelity's shuffling and drawing
SUBSET = 1000  # rows of each of KID's subsets


def frechet(
    network: str,
    output: str,
    published: str,
    value: str = "fd",
    divisor: Literal["n - 1", "n"] = "n - 1",
    compat: str | None = None,
) -> Metric:
    """The Fréchet distance. published: its name in papers. value: "fd" on the network's main output, else another."""
    moments = Moments(output, divisor)

    def compute(samples: Side, reference: Side) -> dict[str, float]:
        return {value: frechet_distance(samples[moments], reference[moments], compat)}

    return Metric(
        definition=f"Fréchet distance of Gaussians{'' if value == 'fd' else f' on {output}'}, covariance divisor {divisor}"
        + ("" if compat is None else f", square root by {compat}"),
        network=network,
        compute=compute,
        published={value: published},
        of_samples=(moments,),
        of_reference=(moments,),
    )


def inception_score(network: str, splits: Splits, words: str) -> Metric:
    """The Inception Score and, of more than one split, its population deviation. words: the splits, for the record."""

    def compute(samples: Side, reference: Side) -> dict[str, float]:
        scores = samples[splits]
        return {"exp_kl": float(scores.mean()), "exp_kl_std": float(scores.std(correction=0))}

    return Metric(
        definition=f"exp of the mean KL divergence of class probabilities from their mean, {words}",
        network=network,
        compute=compute,
        published={"exp_kl": "is", "exp_kl_std": "is_std"},
        of_samples=(splits,),
        least=splits.splits or 2,
    )


def kernel_distance(network: str, output: str, prefix: str = "", deviation: bool = True, least: int = SUBSET) -> Metric:
    """KID: the unbiased squared discrepancy of 100 pairs of subsets of 1000, cubic kernel. prefix: of its published name.

    least: with fewer pictures than 1000, but not than these, the subsets are as large as the smaller side.
    """
    rows = Rows(output)

    def compute(samples: Side, reference: Side) -> dict[str, float]:
        fake, real = samples[rows], reference[rows]
        size = min(SUBSET, len(fake), len(real))
        values = kid(fake, real, *draw_subsets(len(fake), len(real), np.random.RandomState(SEED), size=size))
        spread = {"kd_std": float(values.std(correction=0))} if deviation else {}
        return {"kd": float(values.mean()), **spread}

    return Metric(
        definition=f"unbiased squared maximum mean discrepancy on {output}, kernel (x.y / d + 1)^3, mean of 100 subsets "
        f"of {SUBSET}{'' if least == SUBSET else ', or of all'}",
        network=network,
        compute=compute,
        published={"kd": f"{prefix}kid", "kd_std": f"{prefix}kid_std"},
        of_samples=(rows,),
        of_reference=(rows,),
        least=least,
    )


def manifold(
    network: str,
    output: str,
    words: str,
    measure: Callable[[Tensor, Tensor], Overlap],
    values: tuple[str, ...],
    k: int = 3,
) -> Metric:
    """Some fields of `eval.manifold.Overlap`. words: k, balls and arithmetic, for the record."""
    rows = Rows(output)

    def compute(samples: Side, reference: Side) -> dict[str, float]:
        found = measure(samples[rows], reference[rows])
        return {value: getattr(found, value) for value in values}

    return Metric(
        definition=f"{' and '.join(values)} on {output}, {words}",
        network=network,
        compute=compute,
        published={value: value for value in values},
        of_samples=(rows,),
        of_reference=(rows,),
        least=k + 1,
    )


def kynkaanniemi(network: str, output: str) -> Metric:
    """Precision and recall, k = 3, closed balls."""
    return manifold(network, output, "k = 3, closed balls", precision_recall, ("precision", "recall"))


def naeem(network: str, output: str) -> Metric:
    """Density and coverage, k = 5, open balls."""
    return manifold(network, output, "k = 5, open balls", density_coverage, ("density", "coverage"), k=5)


def clip_discrepancy(network: str, output: str) -> Metric:
    """CMMD: 1000 times the biased squared discrepancy, Gaussian kernel of sigma 10."""
    rows = Rows(output)

    def compute(samples: Side, reference: Side) -> dict[str, float]:
        return {"mmd": cmmd(samples[rows], reference[rows])}

    return Metric(
        definition=f"1000 x biased squared maximum mean discrepancy on {output}, Gaussian kernel, sigma 10",
        network=network,
        compute=compute,
        published={"mmd": "cmmd"},
        of_samples=(rows,),
        of_reference=(rows,),
    )


def label_accuracy(network: str) -> Metric:
    """The share of samples recognised as their class."""
    right = Right()
    return Metric(
        definition="share of pictures that the network assigns to the class they were made for",
        network=network,
        compute=lambda samples, reference: {"label_accuracy": samples[right]},
        published={},
        of_samples=(right,),
        least=1,
    )


def real_accuracy(network: str) -> Metric:
    """The same of the reference: the classifier's own accuracy, where the reference is held out."""
    right = Right()
    return Metric(
        definition="share of pictures of the reference that the network assigns to their class",
        network=network,
        compute=lambda samples, reference: {"classifier_accuracy": reference[right]},
        published={},
        of_reference=(right,),
        least=1,
    )


def of_pairs(network: str, output: str, name: str, definition: str) -> Metric:
    """The mean over pairs of a sample and its original. name: of the value, the same under any number of pairs."""
    mean = Mean(output)
    return Metric(
        definition=definition,
        network=network,
        compute=lambda samples, reference: {name: samples[mean]},
        published={name: name} if network.startswith("lpips") else {},
        of_samples=(mean,),
        pairs=True,
        least=1,
    )


FID = frechet("inception/tf1", "2048", "fid")
FID_PYTORCH = frechet("inception/pytorch", "2048", "fid")
IS_SHUFFLED = inception_score(
    "inception/tf1",
    Splits("logits_unbiased", splits=10, seed=SEED),
    "10 equal splits after a fixed shuffle, logits without bias",
)
