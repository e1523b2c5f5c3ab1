"""LARP in the registry: the original layouts at full size, the numbers of parameters, recipes, every key accounted for."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import generators
import tokenizers_vis
from generators.next_token import larp_ar_from_published
from layers.keymap import CheckpointMismatch
from layers.record import UnknownName
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from tokenizers_vis.larp import LARP_KEYS
from training.larp_prior import larp_prior_from_published
from training.published import FROM_PUBLISHED, Entry, entries

NAMES = ("larp-l-long-tokenizer", "larp-l-long-ar", "larp-l-long-ar-fp")
Shapes = dict[str, tuple[int, ...]]


def pair(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def tokenizer_layout(d: int = 768, depth: int = 12, prior: int = 384) -> Shapes:
    shapes = {
        "encoder_patch_pe": (1, 1024, d),
        "encoder_latent_query_embed": (1024, d),
        "decoder_latent_pe": (1, 1024, d),
        "decoder_patch_query_embed": (1, 1024, d),
        "decoder_patch_query_token_type_embed": (1, 1, d),
        "bottleneck.regularizer.embedding.weight": (8192, 16),
        "prior_model.pos_emb": (1, 1024, prior),
        **pair("x_embedder.proj", d, 3, 4, 8, 8),
        **pair("bottleneck.in_linear", 16, d),
        **pair("bottleneck.out_linear", d, 16),
        **pair("final_layer.norm_final", d),
        **pair("final_layer.linear", 768, d),
        **pair("prior_model.input_proj", prior, 16),
        **pair("prior_model.ln_f", prior),
        **pair("prior_model.head", 16, prior),
    }
    for block in (f"{side}.blocks.{i}" for side in ("encoder", "decoder") for i in range(depth)):
        shapes |= pair(f"{block}.norm1", d) | pair(f"{block}.norm2", d) | pair(f"{block}.attn.proj", d, d)
        shapes |= pair(f"{block}.mlp.fc1", 4 * d, d) | pair(f"{block}.mlp.fc2", d, 4 * d)
        shapes[f"{block}.attn.qkv.weight"] = (3 * d, d)
    for block in (f"prior_model.blocks.{i}" for i in range(12)):
        shapes |= pair(f"{block}.ln1", prior) | pair(f"{block}.ln2", prior)
        shapes |= pair(f"{block}.mlp.0", 4 * prior, prior) | pair(f"{block}.mlp.2", prior, 4 * prior)
        for part in ("key", "query", "value", "proj"):
            shapes |= pair(f"{block}.attn.{part}", prior, prior)
    return shapes


def generator_layout(config: dict[str, Any]) -> Shapes:
    d, vocab, continues = config["dim"], config["vocab_size"], config.get("frame_prediction", False)
    hidden = -(-int(2 * 4 * d / 3) // 256) * 256
    shapes = {
        "abs_pe": (1, config["max_seq_len"] + config["cls_token_num"] - 1, d),
        "tok_embeddings.weight": (vocab + continues, d),
        "norm.weight": (d,),
        "output.weight": (vocab, d),
    }
    if not continues:
        shapes["cls_embedding.embedding_table.weight"] = (config["num_classes"] + 1, d)
    for i in range(config["n_layer"]):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (3 * d, d),
            f"layers.{i}.attention.wo.weight": (d, d),
            f"layers.{i}.feed_forward.w1.weight": (hidden, d),
            f"layers.{i}.feed_forward.w3.weight": (hidden, d),
            f"layers.{i}.feed_forward.w2.weight": (d, hidden),
            f"layers.{i}.attention_norm.weight": (d,),
            f"layers.{i}.ffn_norm.weight": (d,),
        }
    return shapes


def hollow(entry: Entry) -> dict[str, Tensor]:
    """Zeros of full shape, of one number each in memory."""
    shapes = tokenizer_layout() if entry.kind == "tokenizer" else generator_layout(entry.config)
    return {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}


def build(entry: Entry, state: dict[str, Tensor]) -> nn.Module:
    return FROM_PUBLISHED[entry.kind](entry.family, state, entry.config)


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_takes_the_original_layout_and_has_the_published_number_of_parameters(name: str) -> None:
    entry = entries()[name]
    model = build(entry, hollow(entry))  # raises for a key that is left over, missing or of another shape
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(millions - entry.parameters) < (0.1 if entry.kind == "tokenizer" else 1.5)


def shallow(name: str) -> tuple[Entry, dict[str, Tensor]]:
    """The entry with one block a network, the tokenizer narrow as well, and its layout."""
    entry = entries()[name]
    if entry.kind == "tokenizer":
        small = {"encoder_depth": 1, "decoder_depth": 1, "encoder_hidden_size": 48, "decoder_hidden_size": 48}
        shapes = tokenizer_layout(48, depth=1)
    else:
        small = {"n_layer": 1}
        shapes = generator_layout({**entry.config, **small})
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return replace(entry, config={**entry.config, **small}), state


def test_the_generators_fit_the_tokenizer_they_name() -> None:
    tokenizer, *made = (build(*shallow(name)) for name in NAMES)
    assert all(generator.spec == tokenizer.spec for generator in made)
    assert tokenizer.spec.decoded == (16, 128, 128) and tokenizer.prefixes == (1024,)
    assert made[1].condition.slots == 1025


def test_the_prior_of_the_file_is_the_one_that_the_configuration_names() -> None:
    entry = entries()["larp-l-long-tokenizer"]
    prior = larp_prior_from_published(hollow(entry), entry.config)
    assert abs(sum(p.numel() for p in prior.parameters()) / 1e6 - 21.7) < 0.05


def test_the_recipes_are_those_of_the_published_numbers() -> None:
    found = {name: Sampler.from_values({"greedy": False, **entries()[name].recipe}).guidance for name in NAMES[1:]}
    assert found == {"larp-l-long-ar": Guidance(1.25), "larp-l-long-ar-fp": Guidance(1.0)}


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_needed_or_ignored_for_a_reason(name: str) -> None:
    entry, state = shallow(name)
    build(entry, state)
    needed = {key for key in state if not key.startswith("prior_model.")}
    build(entry, {key: state[key] for key in needed})
    for key in needed:
        with pytest.raises(CheckpointMismatch, match=r"not in the checkpoint|needs 2 parts"):
            build(entry, {other: tensor for other, tensor in state.items() if other != key})
    with pytest.raises(CheckpointMismatch, match=r"prior_model\.extra"):
        build(entry, state | {"prior_model.extra": torch.empty(1, device="meta")})


def test_the_keys_that_are_ignored_are_those_of_the_prior_and_one_number() -> None:
    ignored = {key for key, target in LARP_KEYS.items() if target is None}
    assert {key for key in ignored if not key.startswith("prior_model.")} == {
        "bottleneck.regularizer.stochastic_temperature_inv"
    }
    assert set(entries()["larp-l-long-tokenizer"].ignored) == {"prior_model.*"}


def test_arguments_that_are_not_known_or_do_not_fit_are_refused() -> None:
    config = entries()["larp-l-long-ar"].config
    with pytest.raises(UnknownName, match="argument 'n_layers' is not known; did you mean 'n_layer'"):
        larp_ar_from_published({}, {**config, "n_layers": 3})
    with pytest.raises(ValueError, match="'class_cond' with cls_token_num=2, must be 'class_cond' with 1"):
        larp_ar_from_published({}, {**config, "cls_token_num": 2})
    assert generators.PUBLISHED["larp"] is larp_ar_from_published and "larp" in tokenizers_vis.PUBLISHED
