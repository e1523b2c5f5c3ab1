"""Sample pictures or clips from a run or a published checkpoint: some to look at, or many for a score.

    python scripts/sample.py --run runs/demo --per-class 8 --grid grid.png
    python scripts/sample.py --published llamagen-b-256 --classes 207 360 --grid grid.png    # or --weights FILE
    python scripts/sample.py --run runs/var --classes 3 --preview preview.png                # or .gif: while it is made
    python scripts/sample.py --run runs/moving-digits-larp-ar --clips clips.mp4              # or .gif, or a filmstrip .png
    python scripts/sample.py --run runs/k600-larp-ar --clip start.mp4 --frames 5 --clips clips.gif    # goes on from it
    accelerate launch scripts/sample.py --run runs/my-run --num 50000 --out samples.npz     # stop and repeat it to resume

Sample i is a function of the seed, i and its class (or given clip) alone: not of batch size, processes or where the work was
resumed.
"""

from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from tqdm import tqdm

from data.given import GivenFrames
from eval.pixels import UINT8_RULES, to_uint8
from eval.report import save_grid
from layers.checkpoint import read_tensors
from layers.spec import Condition
from sampling.clip_files import ENDINGS, MP4_LOSS, save_clips
from sampling.preview import Previews, shown_lengths
from sampling.shards import Shards, plan_labels
from training.decoder import Decoder, add_decoder_arguments, open_decoder
from training.options import command_line
from training.run import RunError, versions

BLOCK = 256  # pictures, or frames of clips, of one file of a large run
SHOWN = 64  # pixels that a small preview is enlarged to


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add_decoder_arguments(made)
    made.add_argument("--classes", type=int, nargs="+", default=None, help="Class ids. Default: all, at most 100.")
    made.add_argument("--per-class", type=int, default=8, help="Samples of each class, caption or given clip.")
    made.add_argument(
        "--text-features", type=str | None, default=None, help="safetensors with text (N, S, D), text_mask (N, S)."
    )
    made.add_argument(
        "--clip", type=Path | None, default=None, help="Video or folder of videos that samples go on from."
    )
    made.add_argument(
        "--frames", type=int | None, default=None, help="How many first frames of it are given. Default: as trained."
    )
    made.add_argument("--grid", type=str | None, default=None, help="PNG to write; one row a class.")
    made.add_argument(
        "--clips",
        type=Path | None,
        default=None,
        help="Of videos: MP4 or GIF in which samples play, one row a class, or PNG, one row a sample, of its frames.",
    )
    made.add_argument(
        "--preview",
        type=Path | None,
        default=None,
        help="PNG with one row a sample, or GIF: the picture after the first tokens, then after more of them.",
    )
    made.add_argument("--fps", type=float, default=8, help="Frames a second of what plays.")
    made.add_argument("--num", type=int | None, default=None, help="How many samples to write to --out.")
    made.add_argument("--out", type=str | None, default=None, help="NAME.npz, or a folder of PNG (of clips MP4) files.")
    made.add_argument(
        "--class-plan", type=Literal["balanced", "random"], default="balanced", help="Classes of --num samples."
    )
    made.add_argument("--batch-size", type=int, default=32, help="Samples decoded together.")
    made.add_argument("--device", type=str | None, default=None, help="Default: the GPU where there is one.")
    return made


def main(arguments: list[str] | None = None) -> None:
    cli = parser()
    options = cli.parse_args(arguments)
    if (options.run is None) == (options.published is None):
        cli.error("give --run FOLDER or --published NAME")
    asked = [options.grid, options.clips, options.preview, options.out]
    if sum(it is not None for it in asked) != 1 or (options.out is None) != (options.num is None):
        cli.error("give --grid FILE, or --num N with --out FILE; of videos --clips FILE; --preview FILE")
    for film in (options.clips, options.preview):
        if film is not None and film.suffix not in ENDINGS:
            cli.error(f"{film} must end in one of {', '.join(ENDINGS)}")
    accelerator = Accelerator(cpu=options.device == "cpu")
    device = torch.device(options.device or accelerator.device)
    decoder = open_decoder(cli, arguments, device)
    given = given_frames(decoder, options)
    if options.out is not None:
        write_many(decoder, options, given, accelerator)
    elif options.preview is not None:
        draw_previews(decoder, options)
    else:
        draw(decoder, options, given)


def given_frames(decoder: Decoder, options: Namespace) -> GivenFrames | None:
    """What samples go on from. Raises RunError where the model cannot."""
    frames, size = decoder.tokenizer.spec.decoded[:2]
    if options.clip is None:
        if options.frames is not None:
            raise RunError("--frames says how much of --clip is given: give --clip FILE_OR_FOLDER, too")
        return None
    if not decoder.continues:
        raise RunError(
            "--clip: this generator is not told of clips (clip_tokens); leave --clip out, or take another run"
        )
    learned, stride = decoder.given
    count = learned if options.frames is None else options.frames
    if not 1 <= count < frames:
        raise RunError(f"--frames is {count}, this model makes clips of {frames} frames: give 1 to {frames - 1}")
    return GivenFrames(options.clip, count, size, stride)


def sampled(decoder: Decoder, index: Tensor, about: Condition, given: GivenFrames | None) -> Tensor:
    """index int64 (B,) -> pictures or clips, floats. about: where clips are given, its label is the number of one."""
    if given is None:
        return decoder(index, about)
    return decoder.go_on(index, torch.stack([given[number] for number in about.label.tolist()]))


def subjects(decoder: Decoder, options: Namespace, given: GivenFrames | None = None) -> Condition:
    """`per_class` rows a class, a caption or a given clip."""
    if options.text_features is not None:
        about = Condition(**read_tensors(options.text_features))
    elif given is not None:
        about = Condition(label=torch.arange(len(given)))
    else:
        about = Condition(label=torch.tensor(options.classes or list(range(min(decoder.num_classes, 100)))))
    return about.select(torch.arange(about.rows).repeat_interleave(options.per_class))


def draw(decoder: Decoder, options: Namespace, given: GivenFrames | None) -> None:
    """One row a class, a caption or a given clip."""
    moves = decoder.tokenizer.spec.decoded[0] > 1
    if moves != (options.clips is not None):
        raise RunError(f"this model makes {'clips: give --clips' if moves else 'pictures: give --grid'} FILE")
    about = subjects(decoder, options, given)
    batches = tqdm(torch.arange(about.rows).split(options.batch_size), desc="sampling", unit="batch")
    samples = torch.cat([sampled(decoder, index, about.select(index), given) for index in batches])
    row = "given clip" if given is not None else "caption" if options.text_features else "class"
    if moves:
        save_clips(options.clips, samples, columns=options.per_class, fps=options.fps)
        row = "sample" if options.clips.suffix == ".png" else row
        print(f"{options.clips}: {len(samples)} clips, one row a {row}")
    else:
        save_grid(samples, options.grid, columns=options.per_class)
        print(f"{options.grid}: {len(samples)} pictures, one row a {row}")


def draw_previews(decoder: Decoder, options: Namespace) -> None:
    """Every sample after more and more of its tokens."""
    try:
        lengths = shown_lengths(decoder.tokenizer.prefixes)
    except ValueError as error:
        raise RunError(f"--preview: {error}") from error
    about = subjects(decoder, options)
    stages = []
    for index in tqdm(torch.arange(about.rows).split(options.batch_size), desc="sampling", unit="batch"):
        previews = Previews(decoder.tokenizer.decode, lengths)
        decoder(index, about.select(index), preview=previews)
        stages.append(torch.stack([previews.pictures[n] for n in lengths], dim=2))
    plays = options.preview.suffix != ".png"
    look = {"columns": options.per_class, "fps": options.fps, "scale": max(1, SHOWN // stages[0].shape[-1])}
    save_clips(options.preview, torch.cat(stages), **look, names=[f"{n} tokens" if plays else str(n) for n in lengths])
    print(f"{options.preview}: {about.rows} samples after {', '.join(map(str, lengths))} tokens")


def write_many(decoder: Decoder, options: Namespace, given: GivenFrames | None, accelerator: Accelerator) -> None:
    """Blocks of samples, shared out over the processes, then one file with its provenance beside it."""
    choices = decoder.num_classes if given is None else len(given)
    labels = plan_labels(options.num, choices, options.class_plan, options.seed)
    settings = {**decoder.settings, "class_plan": options.class_plan}
    if given is not None:
        settings["given"] = given.describe()
    frames = decoder.tokenizer.spec.decoded[0]
    shards = Shards(Path(options.out), labels, max(1, BLOCK // frames), settings, options.fps)
    if accelerator.is_main_process:
        shards.begin()
    accelerator.wait_for_everyone()
    todo = list(shards.missing(accelerator.process_index, accelerator.num_processes))
    for index in tqdm(todo, desc="sampling", unit=f"x{shards.block}", disable=not accelerator.is_local_main_process):
        made = (
            sampled(decoder, part, Condition(label=labels[part]), given) for part in index.split(options.batch_size)
        )
        parts = [to_uint8(each.movedim(1, -3)).movedim(-3, -1) for each in made]
        shards.write(index, torch.cat(parts))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        machine = {"device": str(decoder.device), "batch_size": options.batch_size, "versions": versions()}
        lossy = frames > 1 and shards.out.suffix != ".npz"
        rule = UINT8_RULES["trunc_128"] + (f", {MP4_LOSS}" if lossy else "")
        shards.finish({**settings, "count": options.num, "quantisation": rule, **machine})
        print(f"{options.out}: {options.num} {'clips' if frames > 1 else 'pictures'}")


if __name__ == "__main__":
    command_line(main)
