"""Caches of moments: what is drawn from one is what the tokenizer would have drawn from the picture."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from data.errors import DataError
from data.loader import sample_rng
from data.sets import open_set
from data.token_cache import CacheHeader, CacheWriter, TokenCache, TokenizerFacts
from layers.record import build
from tokenizers_vis.kl import KLTokenizer
from training.caching import cache_tokens
from training.generator_loop import lesson
from training.jobs import generator_job
from training.options import generator_parser, parse
from training.run import CLASSES, RunFolder, load_run

RECORD = {
    "class_path": "KLTokenizer",
    "init_args": {
        "image_size": 16,
        "channels": 2,
        "width": 8,
        "mult": [1, 1],
        "res_blocks": 1,
        "encoder_attention": [],
        "groups": 4,
        "patch": 2,
        "scale": 0.7,
    },
}
FACTS = TokenizerFacts("kl", "ab" * 32)
HEADER = CacheHeader(FACTS, 3, crops=2, shape=(4, 2, 3), transform="center_flip", classes=["a", "b"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small tokenizer with random weights, patches of 2 x 2 latent cells a token."""
    folder = RunFolder(
        tmp_path_factory.mktemp("kl"), "tokenizer", RECORD, open_set("digits", split="val").describe(), 0
    )
    torch.manual_seed(0)
    tokenizer = build(RECORD, CLASSES)
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder.begin()
    folder.export(tokenizer.state_dict(), tokenizer.spec, step=1)
    return folder.path


def filled(run: Path, out: Path, **options: Any) -> TokenCache:
    cache_tokens(run, "digits", out, split="val", batch_size=64, **options)
    return TokenCache(out, load_run(run).tokenizer_sha256)


def in_tokens(noise: np.ndarray) -> Tensor:
    """Noise of a latent (Z, h, w) where `encode` takes it: (1, L, C)."""
    return rearrange(torch.from_numpy(noise), "z (h p) (w q) -> 1 (h w) (z p q)", p=2, q=2)


@pytest.mark.parametrize(("precision", "bound"), [("float32", 2e-6), ("float16", 4e-3)])
def test_tokens_from_a_cache_are_those_that_encode_draws(
    run: Path, tmp_path: Path, precision: str, bound: float
) -> None:
    cache, tokenizer = filled(run, tmp_path / "cache", precision=precision), load_run(run).tokenizer
    assert isinstance(tokenizer, KLTokenizer) and cache.header.kind == "moments" and cache.header.shape == (4, 8, 8)
    assert np.load(tmp_path / "cache/moments.npy", mmap_mode="r").dtype == precision
    assert cache.describe()["dtype"] == precision and cache.header.tokenizer.record == RECORD
    pictures, crops = open_set("digits", split="val", size=16, transform="center_flip"), []
    for index in range(8):
        sample = cache.sample(index, sample_rng(5, 3, index))
        rng = sample_rng(5, 3, index)
        crops.append(int(rng.integers(2)))
        noise = in_tokens(rng.standard_normal((2, 8, 8), dtype=np.float32))
        wanted = tokenizer.encode(pictures[index]["image"][crops[-1]][None], noise=noise)
        batch = {"latent": sample["latent"][None], "label": sample["label"][None]}
        tokens, condition = lesson(batch, tokenizer, torch.device("cpu"))
        assert_close(tokens, wanted, atol=bound, rtol=0)
        assert condition.label.item() == pictures.labels[index] and sample["index"] == index
    assert set(crops) == {0, 1}


def test_every_epoch_draws_anew_from_the_gaussian_that_is_stored(tmp_path: Path) -> None:
    rng, draws = np.random.default_rng(0), 4000
    mean, std = rng.normal(0, 2, (3, 2, 2, 2, 3)), rng.uniform(0.1, 2, (3, 2, 2, 2, 3))
    mean[:, 1], std[:, 1] = mean[:, 0], std[:, 0]  # the two crops alike, so that all draws are of one law
    writer = CacheWriter(tmp_path / "cache", HEADER)
    writer.write(np.arange(3), np.concatenate([mean, 2 * np.log(std)], axis=2), np.array([0, 1, 1]))
    assert writer.finish()
    cache = TokenCache(tmp_path / "cache", FACTS.sha256)
    drawn = np.stack([cache.sample(1, sample_rng(0, epoch, 1))["latent"].numpy() for epoch in range(draws)])
    error = (drawn.mean(0) - mean[1, 0]) / (std[1, 0] / draws**0.5)
    assert np.abs(error).max() < 4.5  # of 12 standard normal numbers: false alarm in 8e-5 of seeds
    assert np.abs(drawn.var(0) / std[1, 0] ** 2 - 1).max() < 4.5 * (2 / draws) ** 0.5
    assert torch.equal(cache[1]["latent"], cache[1]["latent"]) and cache[1]["latent"].dtype == torch.float32


def test_moments_that_do_not_fit_and_caches_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "cache", HEADER)
    moments, labels = np.zeros((3, 2, 4, 2, 3)), np.array([0, 1, 1])
    for bad in (7e4, np.nan, -np.inf):
        moments[1, 0, 0, 0, 0] = bad
        with pytest.raises(DataError, match=r"moments .* in rows 0 \.\. 2 do not fit float16"):
            writer.write(np.arange(3), moments, labels)
    assert writer.pending() == [0, 1, 2]
    with pytest.raises(DataError, match=r"kind: moments, now codes[\s\S]*tokenizer\.vocab_size: None, now 8"):
        CacheWriter(tmp_path / "cache", replace(HEADER, tokenizer=replace(FACTS, vocab_size=8)))
    with pytest.raises(DataError, match="dtype: float16, now float32"):
        CacheWriter(tmp_path / "cache", replace(HEADER, precision="float32"))


def test_a_tokenizer_without_a_posterior_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(KLTokenizer, "posterior")
    with pytest.raises(DataError, match=r"codes or the moments of a posterior, KLTokenizer makes neither: TokenSpec"):
        filled(run, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_trains_a_generator_through_its_cache_and_resumes_bit_for_bit(run: Path, tmp_path: Path) -> None:
    filled(run, tmp_path / "cache")
    record = {
        "class_path": "MAR",
        "init_args": {
            "dim": 16,
            "depth": 1,
            "heads": 2,
            "buffer": 2,
            "rounds": 2,
            "head": {"class_path": "DiffusionHead", "init_args": {"hidden": 8, "depth": 1, "steps": 2}},
        },
    }

    def train(out: str, steps: int) -> dict[str, Tensor]:
        config = {
            "out": str(tmp_path / out),
            "tokenizer_run": str(run),
            "token_cache": str(tmp_path / "cache"),
            "data": {"name": "digits", "batch_size": 64, "held_out": 1},
            "generator": record,
            "train": {"steps": steps, "save_every": 3, "sample_every": 0, "trackers": []},
        }
        (tmp_path / "mar.yaml").write_text(yaml.safe_dump(config))
        config = parse(generator_parser(), ["--config", str(tmp_path / "mar.yaml")])
        assert generator_job({**config, "resume": (tmp_path / out).exists()})
        return load_file(tmp_path / out / "generator.safetensors")

    whole, _, cut = train("whole", 6), train("cut", 3), train("cut", 6)
    for name, tensor in whole.items():
        assert torch.equal(cut[name], tensor), name
    found = load_run(tmp_path / "whole")
    assert found.record["data"]["kind"] == "moments" and found.provenance["data"] == "digits"
