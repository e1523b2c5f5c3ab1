"""Edit a picture with a generator that was never trained to: in-painting, out-painting, another class in a rectangle.

    python scripts/edit.py --run runs/digits-var --data digits --item 7 --box 0 16 32 16 --out edited.png
    python scripts/edit.py --run runs/digits-var --data digits --item 7 --box 8 8 16 16 --outside true --out wider.png
    python scripts/edit.py --published var-d16 --picture dog.png --box 64 64 128 128 --label 285 --out cat.png
    python scripts/edit.py --published d-ar-l --picture dog.png --keep-first 32 --label 285 --out cat.png    # its layout

The PNG shows, from left to right, the picture, what the generator is given of it (with --keep-first nothing), and the
edited versions.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor

from data.crops import center_crop_arr
from data.sets import open_set
from eval.report import save_grid
from layers.condition import check_labels
from layers.noise import Noise
from layers.spec import Condition
from sampling.editing import box_mask, edit, hide, keep_first
from training.decoder import add_decoder_arguments, open_decoder
from training.options import command_line, underscored


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add_decoder_arguments(made)
    made.add_argument("--picture", type=str | None, default=None, help="Picture file; its centre is cut out.")
    made.add_argument("--data", type=str | None, default=None, help="Or a data set, of which split val is read.")
    made.add_argument("--root", type=str | None, default=None, help="Folder of the data set, where it is not built in.")
    made.add_argument("--item", type=int, default=0, help="Number of the picture in the data set.")
    made.add_argument("--box", type=int, nargs=4, default=None, help="Top, left, height, width in pixels: made anew.")
    made.add_argument(
        "--keep-first", type=int | None, default=None, help="Or how many first tokens stay, for a layout."
    )
    made.add_argument("--outside", type=bool, default=False, help="Make anew what is outside the box instead.")
    made.add_argument("--label", type=int | None, default=None, help="Class id to show. Default: the data set's.")
    made.add_argument("--samples", type=int, default=6, help="Edited versions.")
    made.add_argument("--overlap", type=float, default=0.0, help="Share of a token's cell above which it is made anew.")
    made.add_argument("--out", type=str, required=True, help="PNG to write.")
    made.add_argument("--device", type=str | None, default=None, help="Default: the GPU where there is one.")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    cli, words = parser(), underscored(arguments)
    options = cli.parse_args(words)
    if (options.run is None) == (options.published is None):
        cli.error("give --run FOLDER or --published NAME")
    if (options.picture is None) == (options.data is None):
        cli.error("give --picture FILE or --data NAME")
    if options.picture is not None and options.label is None:
        cli.error("a picture file has no class: give --label")
    if (options.box is None) == (options.keep_first is None):
        cli.error("give --box TOP LEFT HEIGHT WIDTH or --keep-first N")
    device = torch.device(options.device or Accelerator(cpu=options.device == "cpu").device)
    decoder = open_decoder(cli, words, device)
    generator, tokenizer = decoder.generator, decoder.tokenizer
    _, height, width = tokenizer.spec.decoded
    image, label = read(options.picture, options.data, options.root, options.item, height)
    label = torch.tensor([label if options.label is None else options.label])
    check_labels(label, decoder.num_classes)
    images = image.to(device).expand(options.samples, -1, -1, -1)
    condition = Condition(label=label.to(device).expand(options.samples))
    noise = Noise(decoder.seed, torch.arange(options.samples, device=device))
    about = (condition, decoder.sampler, noise)
    try:
        if options.box is None:
            given = [images[:1]]
            made = keep_first(generator, tokenizer, images, options.keep_first, *about)
        else:
            hidden = (box_mask(height, width, tuple(options.box)) ^ options.outside).to(device)
            given = [images[:1], hide(images[:1], hidden)]
            made = edit(generator, tokenizer, images, hidden, *about, options.overlap)
    except ValueError as error:
        cli.error(str(error))
    shown = torch.cat((*given, made)).cpu()
    save_grid(shown, options.out, columns=len(shown))
    what = "the picture, " + "what is given of it, " * (len(given) - 1)
    print(f"{options.out}: {what}{options.samples} edited versions of class {int(label)}")


def read(picture: str | None, data: str | None, root: str | None, item: int, size: int) -> tuple[Tensor, int | None]:
    """A picture float (1, 3, S, S) in [-1, 1], and its class where the data set knows it."""
    if picture is not None:
        with Image.open(picture) as file:
            pixels = torch.tensor(center_crop_arr(file, size))
        return pixels.movedim(-1, 0)[None].float() / 127.5 - 1, None
    found = open_set(data, split="val", root=root, size=size)[item]
    return found["image"][None], int(found["label"])


if __name__ == "__main__":
    command_line(main)
