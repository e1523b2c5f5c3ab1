"""Score how well a run's tokenizer brings pictures back, and draw originals beside reconstructions.

    python scripts/reconstruct.py --run runs/digits-vq
    python scripts/reconstruct.py --run runs/birds-vq --data folder --root /data/birds --split val

Writes reconstruction-DATA-SPLIT.json and .png into the folder of the run: PSNR, SSIM, and the use of the codebook.
"""

import sys
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from data.errors import DataError
from data.loader import evaluation_batches
from data.sets import open_set
from eval.codebook import CodebookUsage
from eval.files import write_json
from eval.pictures import PictureError
from eval.reconstruction import ReconstructionScorer
from eval.report import save_grid
from layers.checkpoint import CheckpointError
from layers.keymap import CheckpointMismatch
from training.run import RunError, load_run


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    made.add_argument("--run", type=Path, required=True, help="Run folder of a tokenizer or a generator.")
    made.add_argument("--data", type=str | None, default=None, help="Name of a data set. Default: the run's own.")
    made.add_argument("--split", type=str, default="val", help="train, val or all.")
    made.add_argument("--root", type=str | None, default=None, help="Folder that holds the pictures, if not built in.")
    made.add_argument("--pictures", type=int, default=16, help="How many are drawn, spread evenly over the set.")
    made.add_argument("--batch-size", type=int, default=32, help="Pictures the tokenizer sees at once.")
    made.add_argument("--device", type=str | None, default=None, help="Default: the GPU where there is one.")
    made.add_argument("--out", type=Path | None, default=None, help="Folder to write to. Default: the run's.")
    made.add_argument("--overwrite", type=bool, default=False, help="Replace the results of an earlier call.")
    return made


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = load_run(options.run, device)
    tokenizer, spec = run.tokenizer, run.tokenizer.spec
    data = options.data or run.record["data"]["name"]
    out = (options.out or options.run) / f"reconstruction-{data}-{options.split}.json"
    if out.exists() and not options.overwrite:
        raise FileExistsError(f"{out}: exists; choose another --out, or --overwrite true")
    pictures = open_set(data, split=options.split, root=options.root, size=spec.decoded[1])
    scorer = ReconstructionScorer(f"reconstructions by {options.run}", f"{data} {options.split}")
    codebook = None if spec.vocab_size is None else CodebookUsage(spec.vocab_size)
    drawn = set(torch.linspace(0, len(pictures) - 1, min(options.pictures, len(pictures))).long().tolist())
    shown = []
    for batch in evaluation_batches(pictures, options.batch_size):
        images = batch["image"].to(device)
        tokens = tokenizer.encode(images)
        decoded = tokenizer.decode(tokens)
        scorer.update(decoded, images)
        if codebook is not None:
            codebook.update(tokens)
        shown += [(a, b) for a, b, i in zip(images, decoded, batch["index"].tolist(), strict=True) if i in drawn]
    scores = scorer.scores(run.provenance, pictures.describe(), options.batch_size, device, codebook)
    write_json(out, {score.name: score.record() for score in scores})
    grid = out.with_suffix(".png")
    save_grid(torch.stack([image for pair in shown for image in pair]), grid, columns=8, scale=2)
    for score in scores:
        print(f"{score.name:24} {score.value:10.4f}   {score.provenance.definition}")
    print(f"{scores[0].provenance.line()}\n{out}\n{grid}: every original with its reconstruction to the right")


if __name__ == "__main__":
    try:
        main()
    except (RunError, CheckpointError, CheckpointMismatch, DataError, PictureError, OSError) as error:
        sys.exit(f"error: {error}")
