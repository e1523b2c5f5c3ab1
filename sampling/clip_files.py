"""Clips to look at: a film (MP4, GIF) in which they play side by side, or a filmstrip (PNG), a row a clip.

What has stages instead of frames, a picture while it is made or at several lengths, is shown the same way, its stages named.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import ceil
from pathlib import Path

import av
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from layers.checkpoint import write_atomic

ENDINGS = (".mp4", ".gif", ".png")
WHITE = 255
LETTERS = 12  # pixels from top to bottom of a name
MP4_LOSS = "then H.264, crf 12, 4:2:0 (lossy)"  # what a film's frames are after their values were rounded


def save_clips(
    path: str | Path,
    clips: Tensor,
    *,
    columns: int | None = None,
    fps: float = 8,
    scale: int = 1,
    gap: int = 2,
    names: Sequence[str] | None = None,
) -> None:
    """Write clips (B, 3, T, H, W), float in [-1, 1], as the ending of `path` says; whole or not at all.

    .mp4: H.264 that browsers play, nearly lossless. .gif: endless, 256 colours a frame; equal neighbours become one longer
    frame. Both show all clips at once, `columns` a row (default: all in one row), at `fps` frames a second.
    .png: a filmstrip, one row a clip, its frames in order from left to right.

    Values become uint8 by clamp(127.5 x + 128, 0, 255), truncated. scale: every pixel so many times; gap: white pixels
    around each clip or frame. names: of the T frames, written above them. Raises ValueError for another ending, shape, or
    no clips.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise ValueError(f"save_clips: {path} ends in {path.suffix!r}; give .mp4, .gif, or .png for a filmstrip")
    if clips.ndim != 5 or clips.shape[1] != 3 or not len(clips):
        raise ValueError(f"save_clips: {path}: clips are {tuple(clips.shape)}, must be (B, 3, T, H, W)")
    pictures = (clips.detach().float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).cpu()
    pictures = pictures.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    if path.suffix == ".png":
        strip = _tiled(rearrange(pictures, "b c t h w -> (b t) c 1 h w"), clips.shape[2], gap)
        if names is not None:
            strip = torch.cat((_written(names, strip.shape[2], pictures.shape[-1] + gap, gap)[None], strip), dim=1)
        write_atomic(path, lambda draft: Image.fromarray(strip[0].numpy()).save(draft, "PNG"))
        return
    film = _tiled(pictures, columns or len(clips), gap)
    if names is not None:
        headers = [_written([name], film.shape[2], film.shape[2], gap) for name in names]
        film = torch.cat((torch.stack(headers), film), dim=1)
    if path.suffix == ".gif":
        write_atomic(path, lambda draft: _write_gif(draft, film, fps))
    else:
        write_atomic(path, lambda draft: write_mp4(draft, film, fps))


def _tiled(clips: Tensor, columns: int, gap: int) -> Tensor:
    """uint8 (B, 3, T, H, W) -> (T, H', W', 3): row by row on white."""
    missing = -len(clips) % columns
    clips = F.pad(clips, (gap, 0, gap, 0), value=WHITE)
    clips = torch.cat((clips, clips.new_full((missing, *clips.shape[1:]), WHITE)))
    sheet = rearrange(clips, "(rows columns) c t h w -> t (rows h) (columns w) c", columns=columns)
    return F.pad(sheet, (0, 0, 0, gap, 0, gap), value=WHITE)


def _written(names: Sequence[str], width: int, step: int, left: int) -> Tensor:
    """uint8 (H', width, 3): names in black on white, one every `step` pixels."""
    font = ImageFont.load_default(LETTERS)
    sheet = Image.new("RGB", (width, LETTERS + 4), "white")
    for place, name in enumerate(names):
        ImageDraw.Draw(sheet).text((left + place * step, 1), name, "black", font)
    return pil_to_tensor(sheet).movedim(0, -1)


def _write_gif(path: Path, film: Tensor, fps: float) -> None:
    first, *others = (Image.fromarray(frame.numpy()).quantize(dither=Image.Dither.NONE) for frame in film)
    first.save(path, "GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0, disposal=1)


def write_mp4(path: Path, film: Tensor, fps: float) -> None:
    """film uint8 (T, H, W, 3); odd sides get a white line more."""
    height, width = (2 * ceil(side / 2) for side in film.shape[1:3])  # subsampled colours need even sides
    film = F.pad(film, (0, 0, 0, width - film.shape[2], 0, height - film.shape[1]), value=WHITE)
    with av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in film:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.contiguous().numpy(), format="rgb24")))
        container.mux(stream.encode())
