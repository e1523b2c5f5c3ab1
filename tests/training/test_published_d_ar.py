"""The D-AR entries of the registry: original layouts and sizes, and pictures with previews from files in them."""

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import generators
from layers.checkpoint import CheckpointError
from layers.keymap import CheckpointMismatch
from layers.noise import Noise
from layers.spec import Condition, Sequence, TokenSpec
from sampling.decode import generate
from sampling.preview import Previews, shown_lengths
from sampling.sampler import Sampler
from tests.goldens import ROOT, read_case
from training import published
from training.published import Entry, check, entries, load_published

KNOWN = entries()
NAMES = [name for name, entry in KNOWN.items() if entry.family == "d-ar" and entry.kind == "generator"]
CASES = ROOT / "tests/goldens/d-ar"
Shapes = dict[str, tuple[int, ...]]


def layout(config: dict[str, Any]) -> Shapes:
    """Keys and shapes of the original generator."""
    dim, vocab = config["dim"], config["vocab_size"]
    hidden = -(-int(2 * 4 * dim / 3) // 256) * 256
    shapes = {"cls_embedding.embedding_table.weight": (config["num_classes"] + 1, dim)}
    shapes |= {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,), "output.weight": (vocab, dim)}
    for i in range(config["n_layer"]):
        at = f"layers.{i}"
        shapes |= {f"{at}.attention.wqkv.weight": (3 * dim, dim), f"{at}.attention.wo.weight": (dim, dim)}
        shapes |= {f"{at}.feed_forward.{name}.weight": (hidden, dim) for name in ("w1", "w3")}
        shapes[f"{at}.feed_forward.w2.weight"] = (dim, hidden)
        shapes |= {f"{at}.{name}.weight": (dim,) for name in ("attention_norm", "ffn_norm")}
    return shapes


@pytest.mark.parametrize("name", NAMES)
def test_a_generator_takes_the_original_layout_and_has_the_published_size(name: str) -> None:
    entry, shapes = KNOWN[name], layout(KNOWN[name].config)
    hollow = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model = generators.from_published("d-ar", hollow, entry.config)
    millions = sum(prod(parameter.shape) for parameter in model.parameters()) / 1e6
    assert abs(millions - entry.parameters) < 0.5 and millions == sum(map(prod, shapes.values())) / 1e6
    assert model.spec == TokenSpec(Sequence(256), decoded=(1, 256, 256), vocab_size=16384)
    assert KNOWN[entry.tokenizer].family == "d-ar" and Sampler.from_values({**entry.recipe, "greedy": False})
    with pytest.raises(CheckpointMismatch, match="freqs_cis"):
        generators.from_published("d-ar", hollow | {"freqs_cis": torch.zeros(1)}, entry.config)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Entry]:
    """The small cases in place of the published ones, under their names."""
    tokenizer, generator = (read_case(CASES / name) for name in ("tokenizer_tiny", "generator_tiny"))
    config = {key: value for key, value in tokenizer.config.items() if not key.startswith("_")} | {"head_dim": 8}
    changed = KNOWN | {
        "d-ar-tokenizer-v1": replace(KNOWN["d-ar-tokenizer-v1"], config=config),
        "d-ar-l": replace(KNOWN["d-ar-l"], config=generator.config | {"image_size": 16}),
    }
    monkeypatch.setattr(published, "entries", lambda: changed)
    return changed


def trainer_file(path: Path, parts: dict[str, dict[str, Tensor]]) -> Path:
    torch.save({**parts, "steps": 5, "optimizer": {"state": {}}}, path)
    return path


def test_files_of_the_original_trainer_make_pictures_and_previews(tmp_path: Path, registry: dict[str, Entry]) -> None:
    weights = read_case(CASES / "tokenizer_tiny").weights()
    spoiled = {key: torch.zeros_like(tensor) for key, tensor in weights.items()}
    coder = trainer_file(tmp_path / "tokenizer.pt", {"ema": weights, "model": spoiled})
    compiled = {f"_orig_mod.{key}": tensor for key, tensor in read_case(CASES / "generator_tiny").weights().items()}
    path = trainer_file(tmp_path / "generator.pt", {"model": compiled})
    found = load_published("d-ar-l", path, coder)
    assert found.generator.spec == found.tokenizer.spec
    torch.testing.assert_close(found.tokenizer.quantizer.rows.data, weights["quantize.embedding.weight"])  # the average
    assert "d-ar-tokenizer-v1" in check(coder, "d-ar-tokenizer-v1").fits

    previews = Previews(found.tokenizer.decode, shown_lengths(found.tokenizer.prefixes))
    sampler = Sampler.from_values({"greedy": False, **found.recipe})
    condition, noise = Condition(label=torch.tensor([0, 4])), Noise(0, torch.arange(2))
    state = generate(found.generator, condition, sampler, noise, preview=previews)
    assert tuple(previews.pictures) == found.tokenizer.prefixes == (4, 7, 10, 12)
    assert torch.equal(previews.pictures[12], found.tokenizer.decode(state.tokens))
    assert torch.equal(previews.pictures[4], found.tokenizer.decode(state.tokens[:, :4]))

    alone = trainer_file(tmp_path / "weights.pt", {"model": weights})  # without an average
    assert torch.equal(load_published("d-ar-tokenizer-v1", alone).tokenizer.decode(state.tokens), previews.pictures[12])
    with pytest.raises(CheckpointError):
        load_published("d-ar-tokenizer-v1", trainer_file(tmp_path / "other.pt", {"state": weights}))
