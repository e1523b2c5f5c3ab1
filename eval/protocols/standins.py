"""Distances on networks that are always at hand, under their own names: for tests, demonstrations, training curves.

rc512 are random convolutions, i3d2d is the Kinetics network of FVD on still pictures (eval/standins.py). Below some
2,000 pictures the kernel distance kd_ is the better one: it has no bias.
"""

from eval.metrics import frechet, kernel_distance
from eval.protocol import Protocol


def _stand_in(network: str, output: str) -> Protocol:
    return Protocol(
        name=network,
        source="this project; a stand-in, comparable with no published number",
        metrics=(frechet(network, output, f"fd_{network}"), kernel_distance(network, output, least=2)),
        count=None,
        class_sampling="balanced",
        uint8="round",
        reference="the pictures that are given",
    )


RC512, I3D2D = _stand_in("rc512", "pooled"), _stand_in("i3d2d", "Mixed_5c")
