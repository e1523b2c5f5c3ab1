"""What several tests of the eval room share."""

import io
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from eval.provenance import Origin

RECORD = {  # as scripts/sample.py writes it beside its samples
    "source": {"run": "tiny", "sha256": {"generator": "aa", "tokenizer": "bb"}},
    "sampler": {"filter": {"top_k": 0}, "guidance": {"scale": 2.0}, "greedy": False},
    "class_plan": "balanced",
    "seed": 3,
    "dtype": "float32",
    "quantisation": "clamp(127.5 x + 128, 0, 255), truncated",
}


@pytest.fixture
def origin() -> Origin:
    return Origin.of_samples(RECORD)


@pytest.fixture(scope="session")
def inception_state() -> dict[str, Tensor]:
    """Random weights of the FID network, in its own layout, that keep its activations at one size."""

    class Empty(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: Mapping[str, Tensor], *_: object, **__: object) -> None:
            assert not state_dict

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = Empty("random", ["2048"], feature_extractor_weights_path=nothing)
    rng = torch.Generator().manual_seed(0)
    state = network.state_dict()
    for name, tensor in state.items():
        if name.endswith(("conv.weight", "fc.weight")):
            tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5, generator=rng)
        elif name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.8, 1.2, generator=rng)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.1, generator=rng)
    return state


@pytest.fixture(scope="session")
def inception_file(inception_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those weights as a torch file."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(inception_state, path)
    return path
