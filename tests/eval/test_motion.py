"""The centre of brightness: where it is, how it moves, that the flight of the moving digits is read from their pixels."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from data.moving_digits import flight, open_moving_digit
from eval.motion import centres, displacement, unevenness


def dots(places: Tensor, size: int = 16) -> Tensor:
    """places int64 (B, T, 2), (y, x) -> clips with one white pixel a frame on black."""
    clips = -torch.ones(len(places), 3, places.shape[1], size, size)
    for row, path in enumerate(places.tolist()):
        for frame, (y, x) in enumerate(path):
            clips[row, :, frame, y, x] = 1
    return clips


def test_a_dot_is_where_it_is_and_moves_as_it_moves() -> None:
    places = torch.tensor([[[1, 2], [4, 6], [7, 10]], [[3, 3], [3, 3], [3, 8]]])
    clips = dots(places)
    assert torch.equal(centres(clips), places.double())
    assert_close(displacement(clips), torch.tensor([5.0, 2.5], dtype=torch.float64))
    assert_close(unevenness(clips), torch.tensor([0.0, 5.0], dtype=torch.float64))


def test_haze_is_not_seen_and_a_dark_frame_has_its_centre_in_the_middle() -> None:
    clips = dots(torch.tensor([[[1, 2], [4, 6]]]))
    hazy = torch.maximum(clips, torch.full_like(clips, 2 * 0.2 - 1))
    assert torch.equal(centres(hazy), centres(clips))
    assert torch.equal(centres(torch.full_like(clips, -1.0)), torch.full((1, 2, 2), 7.5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"clips are \(3, 2, 16, 16\)"):
        centres(clips[0])


def test_the_flight_of_a_digit_is_read_from_its_pixels() -> None:
    """The centre stays where it is in the digit, so its way is that of the corner, whole pixels, to rounding of sums."""
    videos = open_moving_digit("val").pictures
    frames = np.arange(12)
    clips = torch.stack([torch.from_numpy(videos.read(index, lambda n: frames)) for index in range(6)]).double()
    corners = torch.stack(
        [torch.from_numpy(flight(*videos.scene(index)[1:], frames))[:, 0] for index in range(6)]
    ).double()
    seen = centres(clips.permute(0, 4, 1, 2, 3) / 127.5 - 1)
    assert_close(seen - seen[:, :1], corners - corners[:, :1], atol=1e-9, rtol=0)
