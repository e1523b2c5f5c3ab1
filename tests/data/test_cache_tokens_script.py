"""scripts/cache_tokens.py from the command line: killed, and begun again on two processes."""

import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from data.errors import DataError
from data.loader import evaluation_batches
from data.sets import open_set
from data.token_cache import TokenCache
from tests.processes import ENVIRONMENT, command
from tests.small import RECORD, tokenizer_run
from training.run import load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small tokenizer with random weights."""
    return tokenizer_run(tmp_path_factory.mktemp("run"), open_set("digits", split="val").describe())


def caching(run: Path, out: Path, batch_size: int, processes: int = 1) -> list[str]:
    options = ["--tokenizer-run", run, "--data", "emoji32", "--split", "val", "--out", out, "--batch-size", batch_size]
    return command("cache_tokens.py", *options, processes=processes)


def test_a_killed_cache_goes_on_and_holds_what_the_tokenizer_says(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    first = subprocess.Popen(caching(run, out, batch_size=1), env=ENVIRONMENT)
    while not (out / "done.npy").exists() or not np.load(out / "done.npy").any():
        assert first.poll() is None, "the script ended before it wrote anything"
        time.sleep(0.01)
    first.kill()
    first.wait()
    sha256 = load_run(run).tokenizer_sha256
    with pytest.raises(DataError, match=r"unfinished, \d+ of 190"):
        TokenCache(out, sha256)
    subprocess.run(caching(run, out, batch_size=8, processes=2), env=ENVIRONMENT, check=True)
    cache, tokenizer = TokenCache(out, sha256), load_run(run).tokenizer
    pictures = open_set("emoji32", split="val", size=16, transform="center_flip")
    with torch.inference_mode():
        ids = torch.cat([tokenizer.encode(batch["image"].flatten(0, 1)) for batch in evaluation_batches(pictures, 8)])
    same = np.load(out / "codes.npy") == rearrange(ids, "(n a) l -> n a l", a=2).numpy()
    assert same.mean() > 0.999  # in float32 a tie may fall the other way in a batch of another size
    assert cache.header.tokenizer.record == RECORD and cache.header.transform == "center_flip"
    assert np.array_equal(cache.labels, pictures.labels)
