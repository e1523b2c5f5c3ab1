"""The FID network's weights from the TensorFlow graph they were published in, without TensorFlow.

classify_image_graph_def.pb is in tensorflow.org's inception-2015-12-05.tgz, and beside OpenAI's reference batches of ADM.
The graph is parsed, not run: the weights are its constants. Convolutions turn from (h, w, in, out) to (out, in, h, w).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from einops import rearrange
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor

from eval.features import FeatureError

STEM = {  # theirs -> torch-fidelity's
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}
A = {
    "conv": "branch1x1",
    "tower/conv": "branch5x5_1",
    "tower/conv_1": "branch5x5_2",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/conv_2": "branch3x3dbl_3",
    "tower_2/conv": "branch_pool",
}
B = {
    "conv": "branch3x3",
    "tower/conv": "branch3x3dbl_1",
    "tower/conv_1": "branch3x3dbl_2",
    "tower/conv_2": "branch3x3dbl_3",
}
C = {
    "conv": "branch1x1",
    "tower/conv": "branch7x7_1",
    "tower/conv_1": "branch7x7_2",
    "tower/conv_2": "branch7x7_3",
    "tower_1/conv": "branch7x7dbl_1",
    "tower_1/conv_1": "branch7x7dbl_2",
    "tower_1/conv_2": "branch7x7dbl_3",
    "tower_1/conv_3": "branch7x7dbl_4",
    "tower_1/conv_4": "branch7x7dbl_5",
    "tower_2/conv": "branch_pool",
}
D = {
    "tower/conv": "branch3x3_1",
    "tower/conv_1": "branch3x3_2",
    "tower_1/conv": "branch7x7x3_1",
    "tower_1/conv_1": "branch7x7x3_2",
    "tower_1/conv_2": "branch7x7x3_3",
    "tower_1/conv_3": "branch7x7x3_4",
}
E = {
    "conv": "branch1x1",
    "tower/conv": "branch3x3_1",
    "tower/mixed/conv": "branch3x3_2a",
    "tower/mixed/conv_1": "branch3x3_2b",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/mixed/conv": "branch3x3dbl_3a",
    "tower_1/mixed/conv_1": "branch3x3dbl_3b",
    "tower_2/conv": "branch_pool",
}
BLOCKS = {
    "mixed": ("Mixed_5b", A),
    "mixed_1": ("Mixed_5c", A),
    "mixed_2": ("Mixed_5d", A),
    "mixed_3": ("Mixed_6a", B),
    "mixed_4": ("Mixed_6b", C),
    "mixed_5": ("Mixed_6c", C),
    "mixed_6": ("Mixed_6d", C),
    "mixed_7": ("Mixed_6e", C),
    "mixed_8": ("Mixed_7a", D),
    "mixed_9": ("Mixed_7b", E),
    "mixed_10": ("Mixed_7c", E),
}
UNITS = STEM | {
    f"{block}/{theirs}": f"{name}.{ours}" for block, (name, units) in BLOCKS.items() for theirs, ours in units.items()
}
NORMALISATION = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def read_graph(path: str | Path) -> dict[str, Tensor]:
    """The 566 tensors of the network under torch-fidelity's names. Raises FeatureError for a file that is no such graph."""
    path = Path(path)
    if not path.is_file():
        raise FeatureError(f"{path}: no such file; classify_image_graph_def.pb is in inception-2015-12-05.tgz")
    try:
        graph = GraphDef.FromString(path.read_bytes())
    except DecodeError as error:
        raise FeatureError(f"{path}: not a whole TensorFlow graph ({error}); copy or download it again") from error
    constants = {node.name: node for node in graph.node if node.op == "Const"}
    return from_constants(
        {
            name: torch.tensor(make_ndarray(constants[name].attr["value"].tensor))
            for name in wanted_from(constants, path)
        }
    )


def wanted_from(constants: Mapping[str, object], path: Path) -> list[str]:
    """The constants that hold weights. Raises FeatureError naming those that the graph of `path` lacks."""
    wanted = ["softmax/weights", "softmax/biases"]
    for unit in UNITS:
        wanted += [f"{unit}/conv2d_params", *(f"{unit}/batchnorm/{part}" for part in NORMALISATION)]
    missing = [name for name in wanted if name not in constants]
    if missing:
        listed = ", ".join(missing[:5])
        raise FeatureError(
            f"{path}: not the graph of 2015-12-05: {len(missing)} of {len(wanted)} constants are missing, as {listed}"
        )
    return wanted


def from_constants(constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Constants of the graph, by their names there -> the tensors of the torch network."""
    state = {
        "fc.weight": constants["softmax/weights"].T.contiguous(),
        "fc.bias": constants["softmax/biases"],
    }
    for theirs, ours in UNITS.items():
        kernel = constants[f"{theirs}/conv2d_params"]
        state[f"{ours}.conv.weight"] = rearrange(kernel, "h w i o -> o i h w").contiguous()
        for part, name in NORMALISATION.items():
            state[f"{ours}.bn.{name}"] = constants[f"{theirs}/batchnorm/{part}"]
        state[f"{ours}.bn.num_batches_tracked"] = torch.tensor(0)
    return state
