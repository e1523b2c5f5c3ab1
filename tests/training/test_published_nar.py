"""NAR in the registry: the original layouts, the numbers of parameters, the rounds, recipes, files held against them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import generators
from generators.neighboring import Neighboring
from layers.checkpoint import save_tensors
from layers.keymap import CheckpointMismatch
from layers.noise import Noise
from layers.spec import Condition, Sequence
from sampling.decode import generate
from sampling.sampler import Sampler
from tests.training.test_published_larp import tokenizer_layout
from training.published import check, entries, load_published

MILLIONS = {  # of parameters, as published, and half a unit of the last digit that is given
    "nar-b": (130.55, 0.005),
    "nar-m": (295.45, 0.005),
    "nar-l": (372.54, 0.005),
    "nar-xl": (815.99, 0.005),
    "nar-xxl": (1464.45, 0.005),
    "nar-t2i-xl-256": (818.97, 0.005),
    "nar-t2i-xl-512": (818.97, 0.005),
    "nar-video-l": (369, 0.5),
    "nar-video-lp": (694, 0.5),
}
CLIPS = [name for name in MILLIONS if "video" in name]


def layout(config: dict[str, Any], clips: bool) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the original state dict."""
    dim, vocab, extra = config["dim"], *((8192, 2) if clips else (16384, 1))
    hidden = -(-int(8 * dim / 3) // 256) * 256
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, dim)}
    if config.get("model_type") == "t2i":
        shapes["cls_embedding.cap_proj.fc1.weight"] = (dim, 2048)
        shapes["cls_embedding.cap_proj.fc2.weight"] = (dim, dim)
        shapes["cls_embedding.uncond_embedding"] = (120, 2048)
    else:
        shapes["cls_embedding.embedding_table.weight"] = ((101 if clips else 1000) + 1, dim)
    for i in range(config["n_layer"] + extra):
        of = f"layers.{i}"
        shapes |= {f"{of}.attention.wqkv.weight": (3 * dim, dim), f"{of}.attention.wo.weight": (dim, dim)}
        shapes |= {f"{of}.feed_forward.w{n}.weight": (hidden, dim) for n in (1, 3)}
        shapes |= {f"{of}.feed_forward.w2.weight": (dim, hidden)}
        shapes |= {f"{of}.{name}_norm.weight": (dim,) for name in ("attention", "ffn")}
    if clips:
        shapes["abs_pe"] = (1, 1025, dim)
    for norm, output in (
        [(f"norm_{axis}", f"output_{axis}") for axis in "RDB"]
        if clips
        else [("norm", "output"), ("medusa_norm", "medusa_output")]
    ):
        shapes |= {f"{norm}.weight": (dim,), f"{output}.weight": (vocab, dim)}
    return shapes


def on_meta(name: str) -> dict[str, Tensor]:
    shapes = layout(entries()[name].config, name in CLIPS)
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("name", MILLIONS)
def test_an_entry_takes_the_original_layout_and_has_the_published_number_of_parameters(name: str) -> None:
    entry = entries()[name]
    model: Neighboring = generators.from_published(entry.family, on_meta(name), entry.config)
    millions, half = MILLIONS[name]
    assert abs(sum(parameter.numel() for parameter in model.parameters()) / 1e6 - millions) <= half
    Sampler.from_values({"greedy": False, **entry.recipe})
    assert len(model.ends) - 1 == (34 if name in CLIPS else 63 if name.endswith("512") else 31)


def test_every_entry_is_listed_here() -> None:
    assert {name for name, entry in entries().items() if entry.family in ("nar", "nar-video")} == MILLIONS.keys()


def test_clips_are_larps_tokens_read_as_a_grid() -> None:
    entry = entries()["nar-video-l"]
    model = generators.from_published(entry.family, on_meta("nar-video-l"), entry.config)
    assert model.spec.layout == Sequence(1024) and model.spec.decoded == (16, 128, 128)
    assert (model.grid.t, model.grid.h, model.grid.w) == (4, 16, 16)


def test_the_two_extra_read_outs_of_another_model_are_named() -> None:
    state = on_meta("nar-b")
    del state["medusa_output.weight"]
    with pytest.raises(CheckpointMismatch, match=r"head.readout.weight needs 2 parts .* \{0: \(16384, 768\)\}"):
        generators.from_published("nar", state, entries()["nar-b"].config)


def test_a_file_of_clips_is_found_below_its_two_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a small size: the trainer keeps name, arguments and tensors under `model`."""
    sizes = {"dim": 8, "n_layer": 1, "n_head": 2}
    rows = entries()
    entry = rows["nar-video-l"]
    entry.config.update(sizes)
    monkeypatch.setattr("training.published.entries", lambda: rows)
    shapes = layout(sizes, clips=True)
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    torch.save({"model": {"name": "llama-abs-L", "args": {}, "sd": tensors}}, tmp_path / "last_version.pt")
    report = check(tmp_path / "last_version.pt", "nar-video-l")
    assert report.fits == ("nar-video-l",) and report.tensors == len(shapes)
    model = generators.from_published("nar-video", tensors, entry.config)
    prediction = model.step(model.begin([Condition(label=torch.tensor([3]))], Noise(0, torch.arange(1))))
    assert prediction.z.shape == (1, 1, 1, 3, 8)


def test_a_model_that_never_drops_its_class_has_no_row_for_the_null_one() -> None:
    state, config = on_meta("nar-b"), entries()["nar-b"].config
    key = "cls_embedding.embedding_table.weight"
    model = generators.from_published("nar", {**state, key: state[key][:-1]}, {**config, "class_dropout_prob": 0.0})
    assert model.condition.table.weight.shape == (1001, 768)
    with pytest.raises(
        CheckpointMismatch, match=r"condition.table.weight is \(1000, 768\), the model has \(1001, 768\)"
    ):
        generators.from_published("nar", {**state, key: state[key][:-1]}, config)


def test_the_generators_of_clips_are_loaded_with_larps_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a small size: from the two files to a clip."""
    rows, sizes = entries(), {"dim": 16, "n_layer": 1, "n_head": 2}
    narrow = {"encoder_depth": 1, "decoder_depth": 1, "encoder_hidden_size": 12, "decoder_hidden_size": 12}
    rows["nar-video-l"].config.update(sizes)
    rows["larp-l-long-tokenizer"].config.update({**narrow, "encoder_num_heads": 1, "decoder_num_heads": 1})
    monkeypatch.setattr("training.published.entries", lambda: rows)
    generator, coder = layout(sizes, clips=True), tokenizer_layout(12, depth=1)
    torch.manual_seed(0)
    torch.save({"model": {"sd": {key: torch.randn(shape) for key, shape in generator.items()}}}, tmp_path / "nar.pt")
    save_tensors(tmp_path / "larp.safetensors", {key: 0.1 * torch.randn(shape) for key, shape in coder.items()})
    found = load_published("nar-video-l", tmp_path / "nar.pt", tmp_path / "larp.safetensors")
    assert found.generator.spec == found.tokenizer.spec
    assert found.provenance["tokenizer"]["published"] == "larp-l-long-tokenizer"
    state = generate(found.generator, Condition(label=torch.tensor([100])), Sampler(), Noise(0, torch.arange(1)))
    with torch.no_grad():
        assert found.tokenizer.decode(state.tokens).shape == (1, 3, 16, 128, 128)
    assert state.rounds == 34


@pytest.mark.parametrize("name", CLIPS)
def test_the_generators_of_clips_fit_the_tokenizer_they_name(name: str) -> None:
    entry = entries()[name]
    model = generators.from_published(entry.family, on_meta(name), entry.config)
    coder = entries()[entry.tokenizer]
    assert (coder.kind, coder.config["bottleneck_token_num"]) == ("tokenizer", model.spec.length)
    assert model.spec.decoded == (coder.config["frame_num"], coder.config["input_size"], coder.config["input_size"])
    assert model.spec.vocab_size == coder.config["bottleneck"]["args"]["regularizer"]["args"]["codebook_size"]
