"""Steps that fit a training time, on a clock and a job that are made up."""

from pathlib import Path

import pytest

from training import budget
from training.budget import fit_steps, lasting, seconds_a_step
from training.options import Config

CONFIG = {"out": "runs/mine", "resume": True, "train": {"steps": 9, "warmup": 100, "save_every": 4, "lr": 1.0}}


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The jobs that were run; each takes 3 s and 0.5 s a step, the first 7 s more."""
    done: list[Config] = []

    def job(config: Config) -> bool:
        Path(config["out"]).mkdir()  # it must have been removed before
        done.append(config)
        return True

    def now() -> float:
        return 7.0 * bool(done) + sum(3 + 0.5 * it["train"]["steps"] for it in done)

    monkeypatch.setattr(budget, "generator_job", job)
    monkeypatch.setattr(budget.time, "process_time", now)
    return done


def test_a_step_costs_what_more_steps_add(jobs: list[Config], tmp_path: Path) -> None:
    assert seconds_a_step(CONFIG, 11, tmp_path / "piece") == pytest.approx(0.5)
    assert not (tmp_path / "piece").exists()
    assert [it["train"]["steps"] for it in jobs] == [1, 1, 11]
    assert all(it["out"] == str(tmp_path / "piece") and not it["resume"] for it in jobs)


def test_the_steps_fit_the_time_and_the_rest_stays(jobs: list[Config], tmp_path: Path) -> None:
    found = fit_steps(CONFIG, 100.0, tmp_path / "piece")
    assert found == {**CONFIG, "train": {"steps": 200, "warmup": 20, "save_every": 200, "lr": 1.0}}


def test_a_warm_up_that_is_short_enough_stays() -> None:
    assert lasting(CONFIG, 5000)["train"]["warmup"] == 100


def test_one_step_says_nothing_of_the_cost(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        seconds_a_step(CONFIG, 1, tmp_path / "piece")
