"""The MaskGIT entries of the registry: the original layouts, the numbers of parameters, recipes, files held against them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import generators
import tokenizers_vis
from generators.masked import BERT_KEYS, Masked, maskgit_from_published
from layers.checkpoint import save_tensors
from layers.keymap import CheckpointMismatch
from layers.record import UnknownName
from layers.spec import Sequence
from sampling.confidence import Confidence
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from training import published
from training.published import check, entries, generator_weights

NAMES = ["titok-l32-maskgit", "titok-b64-maskgit", "titok-s128-maskgit"]
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "condition_num_classes": 5,
}


def layout(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the original state dict."""
    sizes, vocab = config["model"]["generator"], config["model"]["vq_model"]["codebook_size"]
    d, f, depth = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    table, places = (vocab + sizes["condition_num_classes"] + 2, d), sizes["image_seq_len"] + 1
    if sizes["model_type"] == "ViT":
        shapes = {
            "model.embeddings.word_embeddings.weight": table,
            "model.embeddings.position_embeddings.weight": (places, d),
            "model.embeddings.token_type_embeddings.weight": (2, d),
            **pair("model.embeddings.LayerNorm", d),
            **pair("model.lm_head", vocab, d),
        }
        for i in range(depth):
            layer = f"model.encoder.layer.{i}"
            for name in ("self.query", "self.key", "self.value", "output.dense"):
                shapes |= pair(f"{layer}.attention.{name}", d, d)
            shapes |= pair(f"{layer}.attention.output.LayerNorm", d) | pair(f"{layer}.output.LayerNorm", d)
            shapes |= pair(f"{layer}.intermediate.dense", f, d) | pair(f"{layer}.output.dense", d, f)
        return shapes
    shapes = {"embeddings.weight": table, "pos_embed": (1, places, d), **pair("norm", d), **pair("lm_head", vocab, d)}
    blocks = [f"{side}.{i}" for side in ("in_blocks", "out_blocks") for i in range(depth // 2)]
    for block in (*blocks, "mid_block"):
        shapes |= pair(f"{block}.norm1", d) | pair(f"{block}.norm2", d) | pair(f"{block}.attn.proj", d, d)
        shapes |= pair(f"{block}.mlp.fc1", f, d) | pair(f"{block}.mlp.fc2", d, f)
        shapes[f"{block}.attn.qkv.weight"] = (3 * d, d)
        if block.startswith("out"):
            shapes |= pair(f"{block}.skip_linear", d, 2 * d)
    return shapes


def pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def on_meta(config: dict[str, Any]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in layout(config).items()}


def small(name: str) -> dict[str, Any]:
    model = entries()[name].config["model"]
    return {"model": {"vq_model": {"codebook_size": 20}, "generator": {**model["generator"], **SMALL}}}


def build(name: str, config: dict[str, Any], state: dict[str, Tensor]) -> Masked:
    return generators.from_published(entries()[name].family, state, config)


@pytest.mark.parametrize(("name", "length"), list(zip(NAMES, (32, 64, 128), strict=True)))
def test_an_entry_takes_the_original_layout_and_has_the_published_number_of_parameters(name: str, length: int) -> None:
    entry = entries()[name]
    model = build(name, entry.config, on_meta(entry.config))
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - entry.parameters) < 0.1
    assert (
        model.spec.layout == Sequence(length) and model.spec.vocab_size == 4096 and model.spec.decoded == (1, 256, 256)
    )


def test_the_recipes_are_those_of_the_published_numbers() -> None:
    found = {}
    for name in NAMES:
        sampler = Sampler.from_values({"filter": {}, "greedy": False, **entries()[name].recipe})
        found[name] = sampler.confidence.temperature, sampler.rounds, sampler.guidance
        assert sampler.reveal == "arccos"
        assert sampler.confidence == Confidence(sampler.confidence.temperature, "logit", True, True)
    assert found == {
        "titok-l32-maskgit": (9.5, 8, Guidance(4.5, "titok_linear", "muse")),
        "titok-b64-maskgit": (11.0, 8, Guidance(3.0, "titok_linear", "muse")),
        "titok-s128-maskgit": (2.8, 64, Guidance(6.9, "power_cosine", power=3.0)),
    }


def test_the_tokenizer_has_the_published_number_of_parameters() -> None:
    entry = entries()["maskgit-vqgan"]
    tokenizer = tokenizers_vis.MaskGITVQTokenizer(256, tokenizers_vis.quantizers.VectorQuantizer(1024, 256))
    assert sum(p.numel() for p in tokenizer.parameters()) == 54_515_587
    assert entry.parameters == 54.516
    with pytest.raises(CheckpointMismatch, match="not in the checkpoint"):
        tokenizers_vis.from_published(entry.family, {}, entry.config)  # its arguments are known


NEEDED = {  # one key of every kind: whole, split in two, one of three that are joined, one of which a row is taken
    "titok-l32-maskgit": (
        "word_embeddings",
        "token_type_embeddings",
        "layer.1.attention.self.key.bias",
        "lm_head.bias",
    ),
    "titok-s128-maskgit": ("embeddings.weight", "pos_embed", "mid_block.attn.qkv", "out_blocks.0.skip_linear.bias"),
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in NEEDED.items() for part in parts])
def test_every_key_is_needed(name: str, part: str) -> None:
    config = small(name)
    state = {key: tensor for key, tensor in on_meta(config).items() if part not in key}
    assert len(state) == len(layout(config)) - 1
    with pytest.raises(CheckpointMismatch, match=r"not in the checkpoint|needs 3 parts"):
        build(name, config, state)


def test_no_key_may_be_left_over() -> None:
    config = small("titok-l32-maskgit")
    with pytest.raises(CheckpointMismatch, match="pooler"):
        build("titok-l32-maskgit", config, on_meta(config) | {"model.pooler.dense.weight": torch.empty(16, 16)})


def test_the_places_that_old_files_hold_are_ignored_for_a_reason() -> None:
    config = small("titok-l32-maskgit")
    build("titok-l32-maskgit", config, on_meta(config) | {"model.embeddings.position_ids": torch.arange(33)[None]})
    ignored = {key for key, target in BERT_KEYS.items() if target is None}
    assert ignored == set(entries()["titok-l32-maskgit"].ignored)
    with pytest.raises(UnknownName, match="model_type 'UVit' is not known; did you mean 'UViT'"):
        config["model"]["generator"]["model_type"] = "UVit"
        maskgit_from_published({}, config)


def test_a_file_is_recognised_and_its_weights_are_a_start_for_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = entries()
    known = {name: replace(known[name], config=small(name)) for name in NAMES}
    monkeypatch.setattr(published, "entries", lambda: known)
    path, config = tmp_path / "model.safetensors", known["titok-s128-maskgit"].config
    save_tensors(path, {key: torch.rand(shape) for key, shape in layout(config).items()})
    assert check(path).fits == ("titok-s128-maskgit",)
    state = generator_weights("titok-s128-maskgit", path)
    assert state["embed.weight"].shape == (21, 16) and state["condition.table.weight"].shape == (6, 16)
