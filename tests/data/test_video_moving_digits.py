"""Moving digits: a function of the number, one class a video, straight flight between walls."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from data.moving_digits import CANVAS, DIGIT, FRAMES, ROOM, MovingDigits, flight, open_moving_digits
from data.sets import open_set

LEVEL = 1e-3  # of each statistical test, all with fixed seeds


@pytest.fixture(scope="module")
def videos() -> MovingDigits:
    return open_moving_digits("train").pictures


def all_frames(n: int) -> np.ndarray:
    return np.arange(n)


def test_flight_is_that_of_a_ball_stepped_from_frame_to_frame() -> None:
    rng = np.random.default_rng(0)
    start, velocity = rng.uniform(0, ROOM, (200, 2)), rng.uniform(-5, 5, (200, 2))
    place, speed, stepped = start.copy(), velocity.copy(), []
    for _ in range(60):
        stepped.append(place.copy())
        place = place + speed
        speed = np.where((place < 0) | (place > ROOM), -speed, speed)
        place = np.where(place < 0, -place, np.where(place > ROOM, 2 * ROOM - place, place))
    found = flight(start, velocity, np.arange(60))
    assert (np.abs(found - np.stack(stepped)) <= 0.5 + 1e-9).all()
    assert found.min() >= 0 and found.max() <= ROOM
    assert np.array_equal(flight(start, velocity, np.array([3, 40])), found[[3, 40]])


def test_frames_show_the_brightest_of_the_digits_where_they_fly(videos: MovingDigits) -> None:
    for index in (0, 7, 4321):
        digits, start, velocity = videos.scene(index)
        corners = flight(start, velocity, np.arange(FRAMES))
        film = videos.read(index, all_frames)
        assert film.shape == (FRAMES, CANVAS, CANVAS, 3) and film.dtype == np.uint8
        for frame, places in zip(film, corners, strict=True):
            layers = np.zeros((len(digits), CANVAS, CANVAS), dtype=np.uint8)
            for layer, digit, (top, left) in zip(layers, digits, places, strict=True):
                layer[top : top + DIGIT, left : left + DIGIT] = digit
            assert np.array_equal(frame, np.repeat(layers.max(0)[..., None], 3, -1))
        some = np.array([2, 3, 11])
        assert np.array_equal(videos.read(index, lambda n, some=some: some), film[some])


def test_start_direction_and_speed_follow_their_laws(videos: MovingDigits) -> None:
    scenes = [videos.scene(index)[1:] for index in range(3000)]
    start, velocity = (np.concatenate(parts) for parts in zip(*scenes, strict=True))
    speed = np.hypot(*velocity.T)
    assert speed.min() >= 2 and speed.max() <= 5
    for values, low, width in (
        (start[:, 0], 0, ROOM),
        (start[:, 1], 0, ROOM),
        (speed, 2, 3),
        (np.arctan2(*velocity.T), -np.pi, 2 * np.pi),
    ):
        assert kstest(values, "uniform", (low, width)).pvalue > LEVEL


def test_displacement_between_frames_is_the_speed_but_for_rounding_and_walls() -> None:
    single = open_moving_digits("val", each=1).pictures
    for index in range(100):
        _, start, velocity = single.scene(index)
        corners = flight(start, velocity, np.arange(FRAMES))[:, 0]
        inside = ((corners > 6) & (corners < ROOM - 6)).all(1)
        free = inside[1:] & inside[:-1]
        moved = np.abs(np.diff(corners, axis=0)[free])
        assert (np.abs(moved - np.abs(velocity[0])) <= 1 + 1e-9).all()


def test_all_digits_of_a_video_are_pictures_of_its_class_and_splits_share_none() -> None:
    found = {}
    for split in ("train", "val"):
        source, digits = open_moving_digits(split), open_set("digits", split=split)
        shown = (digits.source.pictures.array[:, 2:-2, 2:-2], digits.labels)
        of_class = {label: {p.tobytes() for p in shown[0][shown[1] == label]} for label in range(10)}
        for index in range(0, 200):
            assert all(digit.tobytes() in of_class[source.labels[index]] for digit in source.pictures.scene(index)[0])
        assert np.bincount(source.labels).tolist() == [len(source.labels) // 10] * 10
        found[split] = set().union(*of_class.values())
    assert found["train"].isdisjoint(found["val"])


def test_a_clip_depends_on_split_and_number_alone() -> None:
    sets = {split: open_set("moving_digits", split=split, size=64, frames=20) for split in ("train", "val", "all")}
    assert [len(made) for made in sets.values()] == [10_000, 1_000, 11_000]
    again = open_set("moving_digits", split="train", size=64, frames=20)
    assert torch.equal(again[9_999]["image"], sets["train"][9_999]["image"])
    seen = {made[index]["image"].numpy().tobytes() for made in sets.values() for index in (0, 10, 20)}
    assert len(seen) == 9
    clip = sets["train"][3]
    assert clip["image"].shape == (3, 20, 64, 64) and clip["label"] == 3
    assert clip["image"].min() == -1 and clip["image"].max() == 1
    assert open_set("moving_digit", split="val").source.name == "moving_digit"


def test_the_videos_stay_what_they_were(videos: MovingDigits) -> None:
    digits, start, velocity = videos.scene(12)
    assert digits.sum((1, 2)).tolist() == [25102, 46050]
    np.testing.assert_allclose(start, [[22.70182522, 10.4176738], [7.57415835, 15.54720212]], atol=1e-7)
    np.testing.assert_allclose(velocity, [[-0.53354489, 2.17434199], [-2.0584398, 3.47352779]], atol=1e-7)
