"""The FID network's weights out of a TensorFlow graph, which the test makes of known ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.compat.proto.graph_pb2 import GraphDef
from torch import Tensor

from eval.features import FeatureError
from eval.inception import load_inception
from eval.tf_inception import BLOCKS, NORMALISATION, UNITS, read_graph
from scripts import convert_inception

DT_FLOAT = 1


def graph_of(constants: dict[str, Tensor]) -> GraphDef:
    graph = GraphDef()
    graph.node.add(name="ExpandDims", op="ExpandDims")
    for name, tensor in constants.items():
        stored = graph.node.add(name=name, op="Const").attr["value"].tensor
        stored.dtype = DT_FLOAT
        stored.tensor_content = tensor.numpy().tobytes()
        for size in tensor.shape:
            stored.tensor_shape.dim.add(size=size)
    return graph


@pytest.fixture(scope="module")
def graph(inception_state: dict[str, Tensor]) -> GraphDef:
    """The network as its graph has it, with a constant that holds no weights."""
    constants = {
        "softmax/weights": inception_state["fc.weight"].T.contiguous(),
        "softmax/biases": inception_state["fc.bias"],
        "mixed/join/concat_dim": torch.tensor([3.0]),
    }
    for theirs, ours in UNITS.items():
        constants[f"{theirs}/conv2d_params"] = inception_state[f"{ours}.conv.weight"].permute(2, 3, 1, 0).contiguous()
        for part, name in NORMALISATION.items():
            constants[f"{theirs}/batchnorm/{part}"] = inception_state[f"{ours}.bn.{name}"]
    return graph_of(constants)


def test_every_tensor_of_the_network_comes_from_the_graph(
    graph: GraphDef, inception_state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the script, in a file that the FID network loads."""
    (tmp_path / "graph.pb").write_bytes(graph.SerializeToString())
    out = tmp_path / "inception.safetensors"
    convert_inception.main(["--graph", str(tmp_path / "graph.pb"), "--out", str(out)])
    found = load_file(out)
    assert found.keys() == inception_state.keys() and len(found) == 566
    assert [name for name, tensor in inception_state.items() if not torch.equal(found[name], tensor)] == [
        name for name in inception_state if name.endswith("num_batches_tracked") and inception_state[name].any()
    ]
    assert "566 tensors" in capsys.readouterr().out
    assert torch.equal(load_inception(out).fc.weight, inception_state["fc.weight"])


def test_blocks_have_the_published_places() -> None:
    """Where the graph's blocks lie in torch: sFID reads mixed_6, the last one is mixed_10."""
    places = {block: name for block, (name, _) in BLOCKS.items()}
    assert places["mixed"] == "Mixed_5b" and places["mixed_6"] == "Mixed_6d" and places["mixed_10"] == "Mixed_7c"
    assert len(UNITS) == len(set(UNITS.values())) == 94
    assert UNITS["mixed_6/conv"] == "Mixed_6d.branch1x1"
    assert UNITS["mixed_10/tower_1/mixed/conv_1"] == "Mixed_7c.branch3x3dbl_3b"


def test_what_is_no_such_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match=r"none\.pb: no such file; classify_image_graph_def\.pb is in"):
        read_graph(tmp_path / "none.pb")
    (tmp_path / "page.pb").write_text("<html>quota exceeded</html>")
    with pytest.raises(FeatureError, match=r"page\.pb: not a whole TensorFlow graph"):
        read_graph(tmp_path / "page.pb")
    (tmp_path / "other.pb").write_bytes(graph_of({"softmax/weights": torch.zeros(2, 2)}).SerializeToString())
    with pytest.raises(FeatureError, match=r"other\.pb: not the graph of 2015-12-05: 471 of 472 constants are missing"):
        read_graph(tmp_path / "other.pb")
    with pytest.raises(FeatureError, match=r"x\.pth: must end in \.safetensors"):
        convert_inception.main(["--graph", str(tmp_path / "other.pb"), "--out", str(tmp_path / "x.pth")])
