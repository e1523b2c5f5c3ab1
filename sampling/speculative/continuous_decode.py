"""Two masked generators of continuous tokens: the small one drafts rounds, the large one tests them together.

Source: CSpD (Wang et al. 2024, arXiv:2411.11925). Both follow the target's schedule of rounds and the same order, with
the same noise at the same place. The first rounds are the target's own; then the draft goes ahead, and after every few
rounds the target predicts all that was drafted since, blind to it, in one forward. A refused token is replaced in place and
nothing is undone, so that the number of rounds is fixed. Under the exact rule the tokens have the law of a target that
predicts each of these blocks in one round and keeps the noise of its last step.

Letters: B samples, L tokens, m tokens of a block, C channels, T tries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from generators.mar import MAR, MARState
from generators.protocol import Prediction
from heads.protocol import Trajectory
from layers.noise import Noise
from layers.record import look_up
from layers.spec import Condition
from sampling.decode import guided
from sampling.sampler import Sampler
from sampling.speculative import continuous


@dataclass(frozen=True)
class Verification:
    """One block: positions int64 (B, m), log_limit (B, m) of continuous.log_acceptance, accepted bool (B, m)."""

    positions: Tensor
    log_limit: Tensor
    accepted: Tensor


@dataclass(frozen=True)
class ContinuousSpeculation:
    """every: a test follows each round whose number is a multiple of it, and the last. prefill: the target makes the rounds
    up to this share of them itself. reading: of continuous.SIGNS; `conditional` is the exact rule, whose temperature is 1.
    tries: at a replacement.

    Raises UnknownName for a reading that is not known, ValueError for a setting out of range.
    """

    every: int = 8
    prefill: float = 0.15
    reading: str = "released"
    temperature: float = continuous.FLAT
    tries: int = continuous.TRIES

    def __post_init__(self) -> None:
        look_up(self.reading, continuous.SIGNS, "reading of the trajectory ratio")
        if self.every < 1 or not 0 <= self.prefill <= 1 or self.tries < 1:
            raise ValueError(
                f"every={self.every} and tries={self.tries} must be at least 1, prefill={self.prefill} in [0, 1]"
            )
        if self.exact and self.temperature != 1:
            raise ValueError(f"the conditional reading is exact at temperature 1 only, got {self.temperature}")

    @property
    def exact(self) -> bool:
        return self.reading == "conditional"

    @torch.inference_mode()
    def generate(
        self, target: MAR, draft: MAR, condition: Condition, sampler: Sampler, noise: Noise
    ) -> tuple[MARState, MARState, list[Verification]]:
        """Decode B samples in as many rounds as the sampler or the target says.

        Returns the states of target, whose tokens (B, L, C) are the result, and of draft, and the tests made. Raises
        ValueError for two generators of different specs.
        """
        if target.spec != draft.spec:
            raise ValueError(f"target and draft must share their tokens: {target.spec} and {draft.spec}")
        branches = guided(condition, sampler)
        rounds = target.rounds if sampler.rounds is None else sampler.rounds
        truth, guess = (model.begin(branches, noise, rounds=rounds) for model in (target, draft))
        pending: list[tuple[Prediction, Trajectory]] = []
        tests = []
        for i, count in enumerate(truth.plan):
            if i <= self.prefill * truth.rounds:
                prediction, made = _predict(target, truth, sampler, noise, i, count)
                for model, state in ((target, truth), (draft, guess)):
                    model.commit(state, prediction.positions, made.sample)
                continue
            prediction, made = _predict(draft, guess, sampler, noise, i, count)
            if self.exact:
                last = noise.normal("last step", prediction.positions, size=(target.spec.channels,))
                made = replace(made, sample=made.mean + made.std * last.to(made.std.dtype))
            draft.commit(guess, prediction.positions, made.sample)
            pending.append((prediction, made))
            if i % self.every == 0 or i == truth.rounds - 1:
                tests.append(self._test(target, truth, draft, guess, pending, sampler, noise, i, len(tests)))
                pending = []
        return truth, guess, tests

    def _test(
        self,
        target: MAR,
        truth: MARState,
        draft: MAR,
        guess: MARState,
        pending: Sequence[tuple[Prediction, Trajectory]],
        sampler: Sampler,
        noise: Noise,
        round: int,
        number: int,
    ) -> Verification:
        """Test what is pending, and put what stays or comes in its place into both states."""
        drafted = _joined([made for _, made in pending])
        prediction, wanted = _predict(target, truth, sampler, noise, round, drafted.sample.shape[1])
        positions = prediction.positions
        limit = continuous.log_acceptance(drafted.sample, drafted, wanted, self.reading, self.temperature)
        accepted = noise.uniform("accept", positions, number).log() < limit
        tokens = drafted.sample
        if not bool(accepted.all()):
            size = (self.tries, tokens.shape[-1])
            normals = noise.normal("tries", positions, number, size).to(tokens.dtype).movedim(2, 0)  # (T, B, m, C)
            u = noise.uniform("tries accepted", positions, number, size[:1]).movedim(2, 0)
            sample = continuous.sample_residual if self.exact else continuous.sample_residual_released
            replacement, _ = sample(drafted, wanted, normals, u, self.reading)
            tokens = torch.where(accepted[..., None], tokens, replacement)
        before = truth.length
        target.commit(truth, positions, tokens)
        draft.rewind(guess, before)
        draft.commit(guess, positions, tokens)
        return Verification(positions, limit, accepted)


def _predict(
    model: MAR, state: MARState, sampler: Sampler, noise: Noise, round: int, count: int
) -> tuple[Prediction, Trajectory]:
    """The next `count` tokens of every row, all under the guidance of this round."""
    prediction = model.step(state, ahead=count)
    prediction = replace(prediction, index=torch.full_like(prediction.index, round))
    return prediction, prediction.head.trajectory(prediction.z, sampler.draw(prediction, noise, round))


def _joined(parts: Sequence[Trajectory]) -> Trajectory:
    """Trajectories of (B, m_i, C) each -> (B, m, C)."""
    names = ("sample", "mean", "std", "logstd_sum")
    return Trajectory(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in names))
