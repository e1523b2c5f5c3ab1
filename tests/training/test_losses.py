"""The tokenizer's objective: closed forms, who gets a gradient, when the adversary starts, which configs are wrong."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import training.losses
from training.losses import TokenizerObjective, gradient_ratio

SMALL = {"discriminator": {"class_path": "PatchDiscriminator", "init_args": {"width": 4, "layers": 2}}}


def pictures(seed: int = 0) -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def has_gradients(module: nn.Module) -> list[bool]:
    return [parameter.grad is not None for parameter in module.parameters()]


class NoDownload(nn.Module):
    """Stands for the perceptual distance: an L1 distance a sample, so that weights can be checked."""

    def __init__(self, backbone_weights: str | None) -> None:
        super().__init__()
        self.backbone_weights = backbone_weights

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return (images - reconstruction).abs().mean((1, 2, 3))


@pytest.fixture
def toy_perceptual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.losses, "PerceptualDistance", NoDownload)


def test_gradient_ratio_of_linear_losses_in_closed_form() -> None:
    """Losses a.w and b.w have gradients a and b whatever w is."""
    w = torch.tensor([0.3, -2.0, 5.0], requires_grad=True)
    a, b = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([0.0, 2.0, 0.0])
    ratio = gradient_ratio(a @ w, b @ w, w)
    assert_close(ratio, torch.tensor(5 / (2 + 1e-4)))
    assert not ratio.requires_grad
    assert w.grad is None
    assert gradient_ratio(1e9 * (a @ w), b @ w, w) == 1e4
    assert gradient_ratio(a @ w, 0 * (b @ w), w) == 1e4
    assert gradient_ratio(0 * (a @ w), b @ w, w) == 0


def test_every_term_enters_with_its_weight(toy_perceptual: None) -> None:
    images, reconstruction = pictures(), pictures(1)
    difference = images - reconstruction
    parts = {
        "codebook": torch.tensor(2.0),
        "entropy_codebook": torch.tensor(5.0),
        "watched": torch.tensor(torch.inf),  # weight 0: logged, and kept out of the sum
        "ids": torch.zeros(2, 4, dtype=torch.int64),
        "stats": {"usage": torch.tensor(0.5)},
    }
    terms = {"codebook": 0.25, "entropy_codebook": -0.1, "watched": 0.0}
    objective = TokenizerObjective(l1=0.3, l2=0.7, perceptual=2.0, terms=terms)
    loss, logs = objective(images, reconstruction, parts, step=0)
    l1, l2 = difference.abs().mean(), difference.square().mean()
    expected = {
        "l1": l1,
        "l2": l2,
        "perceptual": l1,
        "codebook": torch.tensor(2.0),
        "entropy_codebook": torch.tensor(5.0),
        "watched": torch.tensor(torch.inf),
        "loss": 0.3 * l1 + 0.7 * l2 + 2 * l1 + 0.25 * 2 - 0.1 * 5,
    }
    assert_close(logs, expected)
    assert_close(loss, expected["loss"])
    assert not any(value.requires_grad for value in logs.values())


def test_the_adversary_enters_from_its_start_on_and_learns_in_every_nth_step() -> None:
    torch.manual_seed(0)
    images, reconstruction = pictures(), pictures(1)
    objective = TokenizerObjective(l2=1.0, adversarial=0.5, adversarial_start=7, adversarial_every=4, **SMALL)
    l2 = (images - reconstruction).square().mean()
    for step in (0, 6):
        assert objective.adversarial_weight(step) == 0
        loss, logs = objective(images, reconstruction, {}, step)
        assert_close(loss, l2)
        assert set(logs) == {"l2", "loss"}
    for step in (7, 8):
        assert objective.adversarial_weight(step) == 0.5
        fake = objective.adversary.critic(reconstruction)
        loss, logs = objective(images, reconstruction, {}, step)
        assert_close(loss, l2 - 0.5 * fake.mean())
        assert_close(logs["adversarial"], -fake.detach().mean())
    assert [step for step in range(17) if objective.critic_learns(step)] == [8, 12, 16]


def test_each_player_gets_only_its_own_gradient() -> None:
    torch.manual_seed(0)
    images = pictures()
    decoder = nn.Conv2d(3, 3, 1)
    objective = TokenizerObjective(adversarial=1.0, adaptive_weight=True, **SMALL)
    loss, _ = objective(images, decoder(images), {}, 0, decoder.weight)
    loss.backward()
    assert all(has_gradients(decoder))
    assert not any(has_gradients(objective))

    decoder.zero_grad()
    loss, _ = objective.adversary(images.requires_grad_(), decoder(images))
    loss.backward()
    assert all(has_gradients(objective.adversary))
    assert not any(has_gradients(decoder))
    assert images.grad is None


def test_adaptive_weight_balances_the_gradients_at_the_last_layer() -> None:
    torch.manual_seed(0)
    images, decoder = pictures(), nn.Conv2d(3, 3, 1)
    objective = TokenizerObjective(l2=2.0, adversarial=0.5, adaptive_weight=True, terms={"own": 3.0}, **SMALL)
    own = decoder.weight.square().sum()  # the tokenizer's terms do not enter the ratio
    loss, logs = objective(images, decoder(images), {"own": own}, 0, decoder.weight)
    fit = 2 * (decoder(images) - images).square().mean()
    adversarial = -objective.adversary.critic(decoder(images)).mean()
    parts = (fit, adversarial, own, loss)
    d_fit, d_adversarial, d_own, d_loss = (
        torch.autograd.grad(part, decoder.weight, retain_graph=True)[0] for part in parts
    )
    ratio = logs["adaptive_weight"]
    assert_close(ratio, d_fit.norm() / (d_adversarial.norm() + 1e-4))
    assert_close(loss, fit + 3 * own + 0.5 * ratio * adversarial)
    assert_close(d_loss, d_fit + 3 * d_own + 0.5 * ratio * d_adversarial)


def test_a_picture_free_objective_takes_no_reconstruction() -> None:
    """A tokenizer with a generative decoder returns its loss as a term and no picture."""
    objective = TokenizerObjective(l2=0.0, terms={"flow": 2.0})
    loss, _ = objective(pictures(), None, {"flow": torch.tensor(3.0)}, 0)
    assert loss == 6


def test_nothing_is_built_for_a_weight_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the perceptual network was built for nothing")

    monkeypatch.setattr(training.losses, "PerceptualDistance", refuse)
    objective = TokenizerObjective(l1=1.0, l2=1.0)
    assert objective.adversary is None
    assert list(objective.parameters()) == []


def test_the_backbone_file_reaches_the_perceptual_distance(toy_perceptual: None) -> None:
    objective = TokenizerObjective(perceptual=1.0, backbone_weights="vgg16.pth")
    assert objective.perceptual.backbone_weights == "vgg16.pth"


def test_terms_and_the_tokenizer_must_agree() -> None:
    parts = {"codebook": torch.tensor(1.0), "commitment": torch.tensor(1.0)}
    objective = TokenizerObjective(terms={"codebook": 1.0, "comitment": 0.25})
    with pytest.raises(ValueError, match=r"\['comitment'\].*has the terms \['codebook', 'commitment'\]"):
        objective(pictures(), pictures(), parts, 0)
    objective = TokenizerObjective(terms={"codebook": 1.0})
    with pytest.raises(ValueError, match=r"\['commitment'\] have no weight"):
        objective(pictures(), pictures(), parts, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"l2": -1.0}, "not negative.*'l2': -1.0"),
        ({"adversarial": float("nan")}, "'adversarial': nan"),
        ({"terms": {"codebook": float("inf")}}, "finite weights.*codebook"),
        ({"terms": {"loss": 1.0}}, "names other than.*loss"),
        ({"l2": 0.0}, "nothing to train for"),
        ({"l2": 0.0, "adversarial": 1.0, "terms": {"codebook": 0.0}}, "nothing to train for"),
        ({"adaptive_weight": True}, "adaptive_weight needs adversarial"),
        ({"l2": 0.0, "terms": {"flow": 1.0}, "adversarial": 1.0, "adaptive_weight": True}, "to compare it with"),
    ],
)
def test_weights_that_make_no_objective_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerObjective(**arguments)


def test_pictures_that_do_not_fit_are_refused() -> None:
    objective = TokenizerObjective()
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\), the reconstruction is \(2, 3, 16, 8\)"):
        objective(pictures(), pictures()[..., :8], {}, 0)
    with pytest.raises(ValueError, match="the reconstruction is none"):
        objective(pictures(), None, {}, 0)


def test_a_missing_last_layer_is_told_at_the_first_step() -> None:
    objective = TokenizerObjective(adversarial=1.0, adversarial_start=1000, adaptive_weight=True, **SMALL)
    with pytest.raises(ValueError, match="needs last_layer"):
        objective(pictures(), pictures(), {}, 0)
