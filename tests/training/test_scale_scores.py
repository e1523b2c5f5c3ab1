"""A tokenizer of several scales is scored scale by scale while it trains, one of a line of tokens by numbers of them."""

from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch.testing import assert_close

from layers.record import build
from tests.tokenizers_vis.test_flextok import pictures
from tests.tokenizers_vis.test_flextok import small as flextok
from tests.training.tiny import QUICK, Pictures, begin, held_out, journal, stream
from tokenizers_vis.quantizers.usage import code_counts, usage_metrics
from training.loop import TrainOptions
from training.losses import TokenizerObjective
from training.run import CLASSES, RunFolder, load_run
from training.tokenizer_loop import score, train_tokenizer

RECORD = {
    "class_path": "MultiScaleVQTokenizer",
    "init_args": {
        "scales": [1, 2, 4],
        "quantizer": {"class_path": "VectorQuantizer", "init_args": {"vocab_size": 8, "dim": 4, "revive_below": 0.1}},
        "channels": 4,
        "mult": [1, 2],
        "groups": 2,
        "res_blocks": 1,
        "drop_scales": 0.5,
    },
}


def test_the_journal_holds_perplexity_and_distance_of_every_scale(tmp_path: Path) -> None:
    options = TrainOptions(steps=6, **QUICK)
    folder = RunFolder(tmp_path / "run", "tokenizer", RECORD, Pictures().describe(), seed=0)
    accelerator = begin(folder, options)
    objective = TokenizerObjective(l2=1.0, terms={"codebook": 1.0, "commitment": 0.25})
    train_tokenizer(build(RECORD, CLASSES), objective, stream(), options, folder, accelerator, held_out=held_out())
    lines = journal(folder.path)
    assert {f"perplexity_scale_{k}" for k in range(3)} | {"revived", "codebook", "commitment"} <= lines[0].keys()

    tokenizer, images = load_run(folder.path).tokenizer, held_out()[0]["image"]
    with torch.no_grad():
        tokens = tokenizer.encode(images)
        for k, (start, end) in enumerate(((0, 1), (1, 5), (5, 21))):
            error = (tokenizer.decode(tokens[:, :end]).clamp(-1, 1) - images).square().flatten(1).mean(1)
            assert_close(lines[-1][f"held_out_psnr_db_scale_{k}"], (10 * (4 / error).log10()).mean().item())
            counts = code_counts(tokens[:, start:end], 8)
            wanted = usage_metrics(counts)["perplexity"].item()
            assert_close(lines[-1][f"held_out_perplexity_scale_{k}"], wanted)
    assert lines[-1]["held_out_psnr_db"] == lines[-1]["held_out_psnr_db_scale_2"]


def test_a_line_of_tokens_is_scored_by_how_many_are_decoded(tmp_path: Path) -> None:
    tokenizer = flextok()
    images = pictures()
    scores = score(tokenizer, [{"image": images}], Accelerator(cpu=True), tmp_path / "shown.png")
    tokens = tokenizer.encode(images)
    for n in (1, 2, 4, 6):
        error = (tokenizer.decode(tokens[:, :n]).float().clamp(-1, 1) - images).square().flatten(1).mean(1)
        assert_close(scores[f"held_out_psnr_db_of_{n}"], (10 * (4 / error).log10()).mean().item())
    assert scores["held_out_psnr_db"] == scores["held_out_psnr_db_of_6"]
    assert sum(name.startswith("held_out_psnr_db_of") for name in scores) == 4
    assert Image.open(tmp_path / "shown.png").size[1] == 5 * (8 + 2) + 2  # the pictures, and a row a length
