"""Turning a data set into a token cache: every picture encoded once, so that generators train without their tokenizer."""

from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from data.errors import DataError
from data.sets import open_set
from data.token_cache import CacheWriter, Precision, TokenizerFacts, fill_cache, picture_header
from tokenizers_vis.protocol import Tokenizer
from training.run import load_run


def cache_tokens(
    tokenizer_run: Path,
    data: str,
    out: Path,
    split: str = "train",
    root: str | None = None,
    transform: Literal["ten", "center", "center_flip"] = "center_flip",
    crop_range: float = 1.1,
    precision: Precision = "float16",
    batch_size: int = 32,
    workers: int = 0,
) -> None:
    """Encode a data set with the tokenizer of a run and write a token cache: its codes, or, where tokens are continuous,
    the moments of the Gaussian that each is drawn from.

    Args:
        tokenizer_run: folder of the run whose tokenizer encodes
        data: digits, emoji32, folder, tar, wds, parquet, cifar10 or imagenet
        out: folder of the cache; one that was interrupted is continued
        split: train, val or all
        root: folder that holds the pictures; not for built-in sets
        transform: crops of a picture: center (1), center_flip (2: it and its mirror picture), ten (10)
        crop_range: ten crops are cut from a centre crop of this many times the tokenizer's picture size
        precision: of what is stored of continuous tokens
        batch_size: pictures a batch; the tokenizer sees this times the number of crops
        workers: processes that read pictures, beside each that encodes
    """
    accelerator = Accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    run = load_run(tokenizer_run, accelerator.device)
    spec = run.tokenizer.spec
    if spec.vocab_size is None and not hasattr(run.tokenizer, "posterior"):
        raise DataError(
            f"{tokenizer_run}: a token cache holds codes or the moments of a posterior, {type(run.tokenizer).__name__} "
            f"makes neither: {spec}"
        )
    facts = TokenizerFacts(
        name=tokenizer_run.resolve().name,
        sha256=run.tokenizer_sha256,
        vocab_size=spec.vocab_size,
        record=run.record["modules"]["tokenizer"]["record"],
        spec=spec.record(),
    )
    frames = {"frames": spec.decoded[0]} if spec.decoded[0] > 1 else {}
    pictures = open_set(
        data, split=split, root=root, size=spec.decoded[1], transform=transform, crop_range=crop_range, **frames
    )

    @torch.inference_mode()
    def encode(images: Tensor) -> Tensor:
        return stored(run.tokenizer, images.to(accelerator.device))

    shape = encode(torch.zeros(1, 3, *spec.decoded[0 if frames else 1 :])).shape[1:]
    with accelerator.main_process_first():
        writer = CacheWriter(out, picture_header(pictures, facts, shape, precision))

    share = len(range(rank, len(pictures), world))
    with tqdm(total=share, initial=share - len(writer.pending(rank, world)), unit="picture", disable=rank > 0) as bar:
        for written in fill_cache(writer, pictures, encode, batch_size, rank, world, workers):
            bar.update(written)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        writer.finish()
    accelerator.end_training()


def stored(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """images (n, 3, S, S) -> what a cache keeps of them: ids (n, T), or mean and log-variance of the latent
    (n, 2Z, h, w)."""
    if tokenizer.spec.vocab_size is not None:
        return tokenizer.encode(images)
    posterior = tokenizer.posterior(images)
    return torch.cat([posterior.mean, posterior.logvar], dim=1)
