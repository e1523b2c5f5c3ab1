"""The registry of published checkpoints, and the loader, on files in the original layout."""

import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from generators.next_token import LLAMAGEN_KEYS, NextToken
from layers.checkpoint import CheckpointError, checksum, save_tensors
from layers.keymap import CheckpointMismatch
from layers.noise import Noise
from layers.record import UnknownName
from layers.spec import Condition, Grid, TokenSpec
from sampling.decode import generate
from sampling.filters import Filter
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from tests.goldens import ROOT
from tokenizers_vis.vq import LLAMAGEN_VQ_KEYS
from training import published
from training.published import FROM_PUBLISHED, Entry, PublishedError, check, entries, fetch, load_published

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]

MILLIONS = {  # of parameters, as published, and half a unit of the last digit that is given
    "llamagen-vq16": (71.9, 0.05),
    "llamagen-vq8": (70, 0.5),
    "llamagen-vq16-t2i": (72, 0.5),
    "llamagen-b-256": (110.9, 0.05),
    "llamagen-b-384": (110.9, 0.05),
    "llamagen-l-256": (342.9, 0.05),
    "llamagen-l-384": (342.9, 0.05),
    "llamagen-xl-384": (774.7, 0.05),
    "llamagen-xxl-384": (1411.0, 0.05),
    "llamagen-3b-384": (3096.7, 0.05),
    "llamagen-t2i-xl-256": (777.7, 0.05),
    "llamagen-t2i-xl-512": (777.7, 0.05),
}
GENERATORS = [name for name, entry in entries().items() if entry.family == "llamagen"]
SMALL_VQ = {"ch": 32, "encoder_ch_mult": [1, 2], "decoder_ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 16}
SMALL_VQ |= {"codebook_size": 24, "codebook_embed_dim": 4, "image_size": 16}
SMALL_GPT = {
    "n_layer": 2,
    "n_head": 2,
    "dim": 16,
    "vocab_size": 24,
    "num_classes": 5,
    "block_size": 16,
    "downsample": 2,
}


# ---- the original layouts, written out


def gpt_layout(config: dict[str, Any]) -> Shapes:
    dim, vocab = config["dim"], config.get("vocab_size", 16384)
    hidden = -(-int(2 * 4 * dim / 3) // 256) * 256
    if config.get("model_type") == "t2i":
        shapes = {
            "cls_embedding.cap_proj.fc1.weight": (dim, 2048),
            "cls_embedding.cap_proj.fc2.weight": (dim, dim),
            "cls_embedding.uncond_embedding": (120, 2048),
        }
    else:
        shapes = {"cls_embedding.embedding_table.weight": (config.get("num_classes", 1000) + 1, dim)}
    for i in range(config["n_layer"]):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (3 * dim, dim),
            f"layers.{i}.attention.wo.weight": (dim, dim),
            f"layers.{i}.feed_forward.w1.weight": (hidden, dim),
            f"layers.{i}.feed_forward.w3.weight": (hidden, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, hidden),
            f"layers.{i}.attention_norm.weight": (dim,),
            f"layers.{i}.ffn_norm.weight": (dim,),
        }
    ends = {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,), "output.weight": (vocab, dim)}
    return shapes | ends


def vq_layout(config: dict[str, Any]) -> Shapes:
    ch, blocks, z = config.get("ch", 128), config.get("num_res_blocks", 2), config.get("z_channels", 256)
    vocab, code = config.get("codebook_size", 16384), config.get("codebook_embed_dim", 8)
    down = [ch * m for m in config["encoder_ch_mult"]]
    up = [ch * m for m in reversed(config["decoder_ch_mult"])]
    shapes = {"quantize.embedding.weight": (vocab, code), "quantize.codebook_used": (65536,)}
    shapes |= conv("quant_conv", z, code, 1) | conv("post_quant_conv", code, z, 1)
    shapes |= half("encoder", 3, ch, down, z, blocks, "downsample", last=True)
    return shapes | half("decoder", z, up[0], up, 3, blocks + 1, "upsample", last=False)


def half(
    side: str, c_in: int, width: int, widths: list[int], c_out: int, blocks: int, resample: str, last: bool
) -> Shapes:
    """Attention stands in the last level of the encoder, the first of the decoder."""
    shapes = conv(f"{side}.conv_in", c_in, width, 3)
    for i, c in enumerate(widths):
        for j in range(blocks):
            shapes |= res(f"{side}.conv_blocks.{i}.res.{j}", width, c)
            width = c
            if i == (len(widths) - 1 if last else 0):
                shapes |= attention(f"{side}.conv_blocks.{i}.attn.{j}", c)
        if i < len(widths) - 1:
            shapes |= conv(f"{side}.conv_blocks.{i}.{resample}.conv", c, c, 3)
    coarsest = widths[-1] if last else widths[0]
    shapes |= res(f"{side}.mid.0", coarsest, coarsest) | attention(f"{side}.mid.1", coarsest)
    shapes |= res(f"{side}.mid.2", coarsest, coarsest)
    return shapes | norm(f"{side}.norm_out", width) | conv(f"{side}.conv_out", width, c_out, 3)


def res(name: str, c_in: int, c_out: int) -> Shapes:
    shapes = norm(f"{name}.norm1", c_in) | conv(f"{name}.conv1", c_in, c_out, 3)
    shapes |= norm(f"{name}.norm2", c_out) | conv(f"{name}.conv2", c_out, c_out, 3)
    return shapes | (conv(f"{name}.nin_shortcut", c_in, c_out, 1) if c_in != c_out else {})


def attention(name: str, c: int) -> Shapes:
    shapes = norm(f"{name}.norm", c)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= conv(f"{name}.{part}", c, c, 1)
    return shapes


def conv(name: str, c_in: int, c_out: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (c_out, c_in, kernel, kernel), f"{name}.bias": (c_out,)}


def norm(name: str, c: int) -> Shapes:
    return {f"{name}.weight": (c,), f"{name}.bias": (c,)}


def layout(entry: Entry) -> Shapes:
    return gpt_layout(entry.config) if entry.kind == "generator" else vq_layout(entry.config)


def on_meta(entry: Entry) -> State:
    return {key: torch.empty(shape, device="meta") for key, shape in layout(entry).items()}


def drawn(entry: Entry, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in layout(entry).items()}


def hollow(entry: Entry) -> State:
    """Zeros of full shape that a torch file keeps in one number each."""
    return {key: torch.zeros(1).expand(shape) for key, shape in layout(entry).items()}


def build(entry: Entry, state: State) -> nn.Module:
    return FROM_PUBLISHED[entry.kind](entry.family, state, entry.config)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Entry]:
    """The registry with three small models in place of the published ones."""
    known = entries()
    changed = {
        "vq": replace(known["llamagen-vq16"], name="vq", config=SMALL_VQ),
        "gpt": replace(
            known["llamagen-b-256"], name="gpt", config=SMALL_GPT, tokenizer="vq", tokenizer_config={"image_size": 8}
        ),
        "flat": replace(known["llamagen-xxl-384"], name="flat", config=SMALL_GPT | {"n_layer": 1}, tokenizer="vq"),
    }
    monkeypatch.setattr(published, "entries", lambda: changed)
    return changed


def files(folder: Path, small: dict[str, Entry]) -> tuple[Path, Path]:
    """Files of "gpt" and "vq" as a training run leaves them: foreign objects beside the tensors."""
    paths = folder / "gpt.pt", folder / "vq.pt"
    for path in paths:
        content = {"model": drawn(small[path.stem]), "args": Namespace(lr=1e-4, data=Namespace(size=8)), "steps": 3}
        torch.save(content, path)
    return paths


# ---- the registry


@pytest.mark.parametrize("name", MILLIONS)
def test_an_entry_takes_the_original_layout_and_has_the_published_number_of_parameters(name: str) -> None:
    entry, (millions, within) = entries()[name], MILLIONS[name]
    model = build(entry, on_meta(entry))  # raises for a key that is left over, missing or of another shape
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) <= within
    assert entry.parameters == millions


def test_the_registry_holds_these_checkpoints() -> None:
    assert {name for name, entry in entries().items() if entry.family.startswith("llamagen")} == set(MILLIONS)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_fits_the_tokenizer_it_names(name: str) -> None:
    entry = entries()[name]
    coder = entries()[entry.tokenizer]
    tokenizer = build(replace(coder, config=coder.config | entry.tokenizer_config), on_meta(coder))
    generator = build(entry, on_meta(entry))
    assert generator.spec == tokenizer.spec
    side = int(name.rsplit("-", 1)[1])
    assert generator.spec.decoded == (1, side, side)
    assert all(number["protocol"]["made_at"] == side for number in entry.reported)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_recipe_makes_a_sampler_with_the_papers_settings(name: str) -> None:
    recipe = entries()[name].recipe
    sampler = Sampler(filter=Filter(**recipe["filter"]), guidance=Guidance(**recipe["guidance"]))
    scale = {"b": 2.0, "l": 2.0, "xl": 1.75, "xxl": 1.75, "3b": 1.65, "t2i": 7.5}[name.split("-")[1]]
    assert sampler.guidance == Guidance(scale=scale)
    assert sampler.filter == Filter(top_k=1000 if "t2i" in name else 0)


def test_the_registry_gives_a_reason_for_every_key_that_the_key_maps_ignore() -> None:
    known = entries()
    for name, keys in {"llamagen-vq16": LLAMAGEN_VQ_KEYS, "llamagen-b-256": LLAMAGEN_KEYS}.items():
        assert set(known[name].ignored) == {key for key, target in keys.items() if target is None}


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'llamagen-xl-384'"):
        load_published("llamagen-xl-348")


# ---- keys and shapes


def without(key: str) -> Callable[[State], None]:
    return lambda state: state.pop(key)


def reshaped(key: str) -> Callable[[State], None]:
    return lambda state: state.update({key: torch.empty(3, 3, device="meta")})


def test_every_key_of_a_full_layout_is_needed() -> None:
    for name in ("llamagen-b-256", "llamagen-t2i-xl-256"):
        entry = entries()[name]
        entry = replace(entry, config=entry.config | {"n_layer": 2})
        for key in layout(entry):
            for change in (without(key), reshaped(key)):
                state = on_meta(entry)
                change(state)
                with pytest.raises(CheckpointMismatch, match=r"^[12] keys do not fit"):
                    build(entry, state)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("norm.weight"), r"trunk\.norm\.weight is not in the checkpoint"),
        (without("layers.11.feed_forward.w3.weight"), r"blocks\.11\.mlp\.fc1\.weight needs 2 parts"),
        (reshaped("output.weight"), r"head\.readout\.weight is \(3, 3\), the model has \(16384, 768\)"),
        (lambda state: state.update(extra=torch.empty(1, device="meta")), r"extra \(1,\) fits 0 rules"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable[[State], None], said: str) -> None:
    entry = entries()["llamagen-b-256"]
    state = on_meta(entry)
    change(state)
    with pytest.raises(CheckpointMismatch, match=said):
        build(entry, state)


# ---- loading


def test_a_nested_file_with_foreign_objects_loads_and_samples(tmp_path: Path, small: dict[str, Entry]) -> None:
    weights, tokenizer_weights = files(tmp_path, small)
    found = load_published("gpt", weights, str(tokenizer_weights))
    assert found.recipe == {
        "filter": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "convention": "llamagen"},
        "guidance": {"scale": 2.0, "schedule": "constant", "rule": "standard"},
    }
    assert found.provenance["file"] == "gpt.pt"
    assert found.provenance["sha256"] == checksum(weights)
    assert found.provenance["tokenizer"]["sha256"] == checksum(tokenizer_weights)
    assert not found.generator.training and not found.tokenizer.training
    sampler = Sampler(Filter(**found.recipe["filter"]), Guidance(**found.recipe["guidance"]))
    tokens = generate(found.generator, Condition(label=torch.tensor([4])), sampler, Noise(0, torch.arange(1))).tokens
    with torch.inference_mode():
        assert found.tokenizer.decode(tokens).shape == (1, 3, 8, 8)


def test_a_lean_start_gives_the_same_model_as_a_plain_one(small: dict[str, Entry]) -> None:
    lean = build(small["gpt"], drawn(small["gpt"]))
    spec = TokenSpec(Grid(1, 4, 4), decoded=(1, 8, 8), vocab_size=24)
    plain = NextToken(spec, dim=16, depth=2, heads=2, num_classes=5).eval()
    plain.load_state_dict(lean.state_dict())
    tokens, condition = torch.arange(16)[None], Condition(label=torch.tensor([2]))
    with torch.no_grad():
        assert_close(lean.logits(tokens, condition), plain.logits(tokens, condition), rtol=0, atol=0)
    for name, entry in small.items():
        model = build(entry, drawn(entry))
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            assert tensor.device.type == "cpu", f"{name}: {key} holds no numbers"
    assert all(p.requires_grad for p in lean.parameters())


def test_a_file_in_half_precision_gives_a_model_in_float32(small: dict[str, Entry]) -> None:
    for entry in (small["gpt"], small["vq"]):
        whole = build(entry, {key: tensor.half().float() for key, tensor in drawn(entry).items()})
        halved = build(entry, {key: tensor.half() for key, tensor in drawn(entry).items()})
        assert_close(halved.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_tokenizer_loads_alone(tmp_path: Path, small: dict[str, Entry]) -> None:
    _, path = files(tmp_path, small)
    found = load_published("vq", path)
    assert found.generator is None and found.recipe == {}
    assert found.tokenizer.encode(torch.zeros(2, 3, 16, 16)).shape == (2, 64)
    with pytest.raises(PublishedError, match="as --weights"):
        load_published("vq", tokenizer_weights=path)


def test_a_file_of_another_model_is_refused_with_its_name(tmp_path: Path, small: dict[str, Entry]) -> None:
    weights, tokenizer_weights = files(tmp_path, small)
    with pytest.raises(CheckpointMismatch, match=re.escape(f"{weights} is not vq")):
        load_published("gpt", weights, weights)
    with pytest.raises(CheckpointError, match=r"found \['args', 'model', 'steps'\]"):
        load_published("flat", weights, tokenizer_weights)


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_a_file_with_code_is_refused_and_the_code_does_not_run(tmp_path: Path, small: dict[str, Entry]) -> None:
    weights, tokenizer_weights = files(tmp_path, small)
    torch.save({"model": drawn(small["gpt"]), "args": Payload(tmp_path / "ran")}, weights)
    for load in (lambda: load_published("gpt", weights, tokenizer_weights), lambda: check(weights)):
        with pytest.raises(CheckpointError, match=r"system.*which is code"):
            load()
    assert not (tmp_path / "ran").exists()


# ---- where files come from


def test_offline_the_error_names_address_cache_and_option(tmp_path: Path) -> None:
    code = "from training.published import load_published; load_published('llamagen-b-384')"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    last = answer.stderr.splitlines()[-1]
    assert answer.returncode == 1 and "PublishedError: llamagen-b-384" in last
    assert "https://huggingface.co/FoundationVision/LlamaGen/resolve/main/c2i_B_384.pt" in last
    assert "--weights FILE" in last and "sha256 is not known" in last
    assert str(tmp_path / "models--FoundationVision--LlamaGen") in last


def test_the_tokenizers_file_has_an_option_of_its_own(tmp_path: Path, small: dict[str, Entry]) -> None:
    weights, _ = files(tmp_path, small)
    with pytest.raises(PublishedError, match=r"absent\.pt: no such file; --tokenizer-weights takes .*vq_ds16_c2i\.pt"):
        load_published("gpt", weights, tmp_path / "absent.pt")
    with pytest.raises(PublishedError, match=r"absent\.pt: no such file; --weights takes .*c2i_B_256\.pt"):
        load_published("gpt", tmp_path / "absent.pt", tmp_path / "absent.pt")


def test_a_download_with_another_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c2i_B_256.pt"
    file.write_bytes(b"cut")
    monkeypatch.setattr(published, "hf_hub_download", lambda hub, name: str(tmp_path / name))
    entry = entries()["llamagen-b-256"]
    assert fetch(entry) == file
    with pytest.raises(PublishedError, match=f"has sha256 .*{'0' * 64}"):
        fetch(replace(entry, sha256="0" * 64))


# ---- what a file holds


@pytest.fixture
def published_file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "c2i_B_384.pt"
    state = hollow(entries()["llamagen-b-256"]) | {"freqs_cis": torch.zeros(577, 32, 2)}
    torch.save({"model": state, "args": Namespace(lr=1e-4)}, path)
    yield path


def test_a_full_size_file_is_recognised(published_file: Path) -> None:
    report = check(published_file)
    entry = entries()["llamagen-b-384"]
    assert report.fits == ("llamagen-b-384", "llamagen-b-256")  # they store the same: the file's name decides
    assert report.faults == ()
    assert report.tensors == len(layout(entry)) + 1
    assert report.ignored == {"freqs_cis": entry.ignored["freqs_cis"]}
    assert report.parameters == sum(prod(shape) for shape in layout(entry).values())
    assert report.sha256 == checksum(published_file)
    assert check(published_file, "llamagen-b-256").fits == ("llamagen-b-256",)


def test_a_file_that_fits_nothing_is_held_against_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    state = hollow(entries()["llamagen-l-256"]) | {"extra": torch.zeros(2)}
    del state["norm.weight"]
    torch.save({"model": state}, path)
    report = check(path)
    same = ("llamagen-l-256", "llamagen-l-384", "d-ar-l")  # they store the same
    assert report.fits == () and report.closest in same
    assert report.parameters is None
    assert [fault.split(" ")[0] for fault in report.faults] == ["extra", "trunk.norm.weight"]
    assert len(check(path, "llamagen-vq8").faults) > 100


def test_flat_nested_and_safetensors_files_are_read_where_their_tensors_lie(
    tmp_path: Path, small: dict[str, Entry]
) -> None:
    weights, tokenizer_weights = files(tmp_path, small)
    flat, safe = tmp_path / "flat.pt", tmp_path / "gpt.safetensors"
    torch.save(drawn(small["flat"]), flat)
    save_tensors(safe, drawn(small["gpt"]))
    found = {path: check(path).fits for path in (weights, tokenizer_weights, flat, safe)}
    assert found == {weights: ("gpt",), tokenizer_weights: ("vq",), flat: ("flat",), safe: ("gpt",)}
    with pytest.raises(CheckpointError, match="no entry 'model'"):
        check(flat, "gpt")
