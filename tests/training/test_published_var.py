"""VAR and MVAR in the registry: the original layouts, the numbers of parameters, recipes, loading at the published size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import generators
from generators.next_scale import VAR_KEYS, NextScale
from layers.keymap import CheckpointMismatch
from layers.noise import Noise
from layers.spec import Condition, Pyramid
from sampling.decode import generate
from sampling.filters import Filter
from sampling.guidance import Guidance, to_standard
from sampling.sampler import Sampler
from tokenizers_vis.multiscale_vq import MultiScaleVQTokenizer
from tokenizers_vis.quantizers import VectorQuantizer
from training import published
from training.published import Entry, check, entries, generator_weights, load_published

MILLIONS = {  # of parameters, as published, and half a unit of the last digit that is given
    "var-d16": (310.3, 0.05),
    "var-d20": (600.9, 0.05),
    "var-d24": (1033.4, 0.05),
    "var-d30": (2010.0, 0.05),
    "var-d36": (2353.9, 0.05),
    "mvar-d16": (310, 0.5),
    "mvar-finetuned-d16": (310, 0.5),
    "mvar-finetuned-d20": (600, 1.0),  # the same parameters as VAR-d20, rounded down
    "mvar-finetuned-d24": (1000, 50),
}
CFG = {"var-d16": 1.5, "var-d36": 1.5, "mvar-d16": 2.7, "mvar-finetuned-d16": 2.0, "mvar-finetuned-d24": 1.4}


def layout(config: dict[str, Any], vocab: int = 4096, channels: int = 32) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the original state dict."""
    c, length = config["embed_dim"], sum(side**2 for side in config["patch_nums"])
    shapes = {
        "word_embed.weight": (c, channels),
        "word_embed.bias": (c,),
        "class_emb.weight": (config.get("num_classes", 1000) + 1, c),
        "pos_start": (1, config["patch_nums"][0] ** 2, c),
        "pos_1LC": (1, length, c),
        "lvl_embed.weight": (len(config["patch_nums"]), c),
        "lvl_1L": (1, length),
        "attn_bias_for_masking": (1, 1, length, length),
        "head_nm.ada_lin.1.weight": (2 * c, c),
        "head_nm.ada_lin.1.bias": (2 * c,),
        "head.weight": (vocab, c),
        "head.bias": (vocab,),
    }
    for i in range(config["depth"]):
        shapes |= {
            f"blocks.{i}.attn.mat_qkv.weight": (3 * c, c),
            f"blocks.{i}.attn.q_bias": (c,),
            f"blocks.{i}.attn.v_bias": (c,),
            f"blocks.{i}.attn.zero_k_bias": (c,),
            f"blocks.{i}.attn.scale_mul_1H11": (1, config["num_heads"], 1, 1),
            f"blocks.{i}.attn.proj.weight": (c, c),
            f"blocks.{i}.attn.proj.bias": (c,),
            f"blocks.{i}.ffn.fc1.weight": (4 * c, c),
            f"blocks.{i}.ffn.fc1.bias": (4 * c,),
            f"blocks.{i}.ffn.fc2.weight": (c, 4 * c),
            f"blocks.{i}.ffn.fc2.bias": (c,),
        }
        if config.get("shared_aln"):
            shapes |= {f"blocks.{i}.ada_gss": (1, 1, 6, c)}
        else:
            shapes |= {f"blocks.{i}.ada_lin.1.weight": (6 * c, c), f"blocks.{i}.ada_lin.1.bias": (6 * c,)}
    if config.get("shared_aln"):
        shapes |= {"shared_ada_lin.1.weight": (6 * c, c), "shared_ada_lin.1.bias": (6 * c,)}
    return shapes


def on_meta(entry: Entry) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in layout(entry.config).items()}


def drawn(entry: Entry) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {key: 0.05 * torch.rand(shape) for key, shape in layout(entry.config).items()}


def build(entry: Entry, state: dict[str, Tensor]) -> NextScale:
    return generators.from_published(entry.family, state, entry.config)


def count(model: NextScale) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MILLIONS)
def test_an_entry_takes_the_original_layout_and_has_the_published_number_of_parameters(name: str) -> None:
    entry, (millions, within) = entries()[name], MILLIONS[name]
    model = build(entry, on_meta(entry))  # raises for a key that is left over, missing or of another shape
    assert abs(count(model) / 1e6 - millions) <= within and entry.parameters == millions
    assert {name for name in entries() if name.startswith(("var-d", "mvar"))} == set(MILLIONS)


@pytest.mark.parametrize("name", MILLIONS)
def test_a_generator_lies_on_the_scales_of_the_tokenizer_it_names(name: str) -> None:
    entry = entries()[name]
    scales = (entries()[entry.tokenizer].config | entry.tokenizer_config)["v_patch_nums"]
    spec = build(entry, on_meta(entry)).spec
    assert spec.layout == Pyramid(tuple((side, side) for side in scales)) and spec.vocab_size == 4096
    assert spec.decoded == (1, 512, 512) if name == "var-d36" else spec.decoded == (1, 256, 256)
    assert all(number["protocol"]["made_at"] == spec.decoded[1] for number in entry.reported)


@pytest.mark.parametrize("name", CFG)
def test_a_recipe_does_what_the_originals_guidance_does(name: str) -> None:
    """(1 + t) c - t u with t = cfg k / (K - 1), as u + s (c - u)."""
    guidance = Guidance(**entries()[name].recipe["guidance"])
    theirs = torch.tensor([to_standard(CFG[name] * k / 9, "var") for k in range(10)], dtype=torch.float64)
    assert guidance.rule == "standard"
    assert_close(guidance.scales(10), theirs)
    assert entries()[name].recipe["filter"]["convention"] == "var"


def test_the_registry_gives_a_reason_for_every_key_that_the_key_map_ignores() -> None:
    ignored = {key.replace("{i}", "*") for key, target in VAR_KEYS.items() if target is None}
    assert set(entries()["var-d16"].ignored) == set(entries()["mvar-d16"].ignored) == ignored


@pytest.mark.parametrize("name", ["var-d16", "var-d36"])
def test_every_key_but_the_ignored_is_needed(name: str) -> None:
    entry = replace(entries()[name], config=entries()[name].config | {"depth": 1})
    for key in layout(entry.config):
        state = on_meta(entry)
        del state[key]
        if key.split(".")[-1] in ("zero_k_bias", "lvl_1L", "attn_bias_for_masking"):
            build(entry, state)
        else:
            with pytest.raises(CheckpointMismatch, match=r"^1 keys do not fit"):
                build(entry, state)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Entry]:
    """The registry with small models in place of the published ones."""
    known, sides = entries(), [1, 2, 3]
    size = {"attn_l2_norm": True, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5, "patch_nums": sides}
    size["vae"] = {"vocab_size": 16, "z_channels": 4}
    coder = {"vocab_size": 16, "z_channels": 4, "ch": 32, "v_patch_nums": sides}
    changed = {
        "var-vqvae": replace(known["var-vqvae"], config=coder),
        "var-d16": replace(known["var-d16"], config=known["var-d16"].config | size),
        "mvar-d16": replace(known["mvar-d16"], config=size | {"kernel_size": 3, "refine_step": 2}),
    }
    monkeypatch.setattr(published, "entries", lambda: changed)
    return changed


def test_flat_files_and_checkpoints_of_the_trainers_hold_the_same(tmp_path: Path, small: dict[str, Entry]) -> None:
    state = {key: 0.05 * torch.rand(shape) for key, shape in layout(small["var-d16"].config, 16, 4).items()}
    files = {
        "flat.pth": state,
        "var.pth": {"trainer": {"var_wo_ddp": state}, "epoch": 3},
        "mvar.pth": {"mvar_wo_ddp": state},
        "own.pth": {"trainer": {"mvar_wo_ddp": state}, "epoch": 3},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        report = check(tmp_path / name)
        assert report.fits == ("mvar-d16" if name in ("mvar.pth", "own.pth") else "var-d16",)
        assert set(report.ignored) == {key for key in state if "zero_k" in key} | {"lvl_1L", "attn_bias_for_masking"}
    weights = generator_weights("var-d16", tmp_path / "var.pth")
    assert_close(weights["head.readout.weight"], state["head.weight"])


def test_a_published_generator_feeds_on_the_reader_of_its_tokenizer(
    tmp_path: Path, small: dict[str, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    tokenizer = MultiScaleVQTokenizer(
        [1, 2, 3], VectorQuantizer(16, 4), channels=4, mult=[1, 1, 1, 1, 1], groups=2
    ).eval()
    monkeypatch.setitem(published.FROM_PUBLISHED, "tokenizer", lambda *_: tokenizer)
    shapes = layout(small["var-d16"].config, 16, 4)
    torch.save({key: 0.05 * torch.rand(shape) for key, shape in shapes.items()}, tmp_path / "var_d16.pth")
    found = load_published("var-d16", tmp_path / "var_d16.pth", tmp_path / "var_d16.pth")
    assert found.generator.spec == tokenizer.spec
    given = torch.randint(16, (2, 14))
    assert_close(found.generator.reader(given), tokenizer.reader()(given))
    sampler = Sampler(Filter(**found.recipe["filter"]), Guidance(**found.recipe["guidance"]))
    state = generate(found.generator, Condition(label=torch.tensor([1, 4])), sampler, Noise(0, torch.arange(2)))
    with torch.inference_mode():
        assert_close(tokenizer.decode(state.tokens), tokenizer.pixels(state.memory))


def test_var_d16_at_its_published_size_loads_within_a_minute(tmp_path: Path) -> None:
    file = tmp_path / "var_d16.pth"
    torch.save(drawn(entries()["var-d16"]), file)
    report = check(file)
    assert report.fits == ("var-d16",) and report.tensors == len(layout(entries()["var-d16"].config))
    assert report.parameters == 310_283_520 and report.seconds < 60
