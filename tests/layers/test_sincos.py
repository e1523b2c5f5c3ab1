"""Fixed positions: closed forms, and the same tables as independent implementations under their own layouts."""

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from einops import rearrange
from timm.layers import build_sincos2d_pos_embed
from torch.testing import assert_close

from layers.sincos import sincos, sincos_2d, sincos_3d
from layers.spec import Grid


def test_one_axis_in_closed_form() -> None:
    place = torch.tensor([[0.0, 1.0], [2.5, -3.0]])
    slow = place / 100  # the second of two pairs turns at 10000^(-1/2)
    assert_close(sincos(place, 4), torch.stack((place.sin(), slow.sin(), place.cos(), slow.cos()), -1))
    assert_close(
        sincos(place, 4, interleaved=True), torch.stack((place.sin(), place.cos(), slow.sin(), slow.cos()), -1)
    )
    assert_close(sincos(place, 4, period=2500.0)[..., 1], (place / 50).sin())


def test_similarity_depends_on_the_distance_alone() -> None:
    table = sincos(torch.arange(40), 64, dtype=torch.float64)
    similarity = table @ table.T
    for distance in range(40):
        diagonal = similarity.diagonal(distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert_close(similarity.diagonal(), torch.full((40,), 32.0, dtype=torch.float64))


def test_one_axis_as_diffusers_timesteps() -> None:
    """A float32 table against one rounded once: places below 50 keep the error of the angle under 50 * 2^-24."""
    steps = torch.arange(50)
    theirs = get_timestep_embedding(steps, 32, flip_sin_to_cos=False, downscale_freq_shift=0)
    assert_close(sincos(steps, 32), theirs, atol=1e-5, rtol=0)


def test_rows_and_columns_as_diffusers_mae() -> None:
    theirs = get_2d_sincos_pos_embed(48, (5, 5), base_size=5, output_type="pt")
    assert_close(sincos_2d(5, 5, 48, dtype=torch.float64), theirs.double(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("column_first", [True, False])
def test_rows_and_columns_as_timm_on_an_oblong_grid(column_first: bool) -> None:
    """timm: (trig, yx, i) with the row first, in float32; ours: (yx, trig, i)."""
    theirs = rearrange(build_sincos2d_pos_embed([3, 7], 32), "l (trig yx i) -> l yx trig i", trig=2, yx=2)
    theirs = (theirs.flip(1) if column_first else theirs).flatten(1)
    assert_close(sincos_2d(3, 7, 32, column_first=column_first), theirs, atol=1e-6, rtol=0)


def test_frames_add_to_the_grid() -> None:
    table = sincos_3d(Grid(4, 2, 3), 16).reshape(4, 6, 16)
    frames = sincos(torch.arange(4), 16)
    for t in range(4):
        assert_close(table[t], sincos_2d(2, 3, 16) + frames[t])


def test_tables_are_rounded_once() -> None:
    for table, exact in [
        (sincos(torch.arange(5000), 32), sincos(torch.arange(5000), 32, dtype=torch.float64)),
        (sincos_3d(Grid(4, 4, 4), 32), sincos_3d(Grid(4, 4, 4), 32, dtype=torch.float64)),
    ]:
        assert table.dtype == torch.float32
        assert torch.equal(table, exact.float())


def test_widths_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ValueError, match="dim is 7, must be even"):
        sincos(torch.arange(3), 7)
    with pytest.raises(ValueError, match="dim is 6, must be a multiple of 4"):
        sincos_2d(2, 2, 6)
    with pytest.raises(ValueError, match="dim is 6, must be a multiple of 4"):
        sincos_3d(Grid(2, 2, 2), 6)
