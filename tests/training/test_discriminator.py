"""PatchGAN: its size and patches as published, its initial weights, what depends on what."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from training.discriminator import PatchDiscriminator


def test_the_default_is_the_published_network() -> None:
    """2.765 M parameters with 3 input channels, as pix2pix and VQGAN report; 256 pixels give 30 x 30 logits."""
    discriminator = PatchDiscriminator()
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 2_765_633
    convolutions = [module for module in discriminator.modules() if isinstance(module, nn.Conv2d)]
    assert [tuple(module.weight.shape[:2]) for module in convolutions] == [
        (64, 3),
        (128, 64),
        (256, 128),
        (512, 256),
        (1, 512),
    ]
    assert [module.stride[0] for module in convolutions] == [2, 2, 2, 1, 1]
    assert [module.bias is not None for module in convolutions] == [True, False, False, False, True]
    with torch.device("meta"):
        assert PatchDiscriminator()(torch.empty(2, 3, 256, 256)).shape == (2, 1, 30, 30)


def test_widths_stop_at_eight_times_the_first() -> None:
    convolutions = [module for module in PatchDiscriminator(1, 2, 5).modules() if isinstance(module, nn.Conv2d)]
    assert [module.out_channels for module in convolutions] == [2, 4, 8, 16, 16, 16, 1]


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_judges_a_patch(layers: int, patch: int) -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(3, 4, layers).eval()  # eval: the statistics of batch norm tie no places together
    images = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = discriminator(images)
    (gradient,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], images)
    rows, columns = gradient[0].abs().sum(0).nonzero().unbind(1)
    assert int(rows.max() - rows.min()) + 1 == patch
    assert int(columns.max() - columns.min()) + 1 == patch


def test_initial_weights_follow_their_law() -> None:
    """Standard deviations of 131,072 weights or more are within 5 standard errors (5.7e-7 a test) of 0.02."""
    torch.manual_seed(0)
    for module in PatchDiscriminator().modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 100_000:
            error = 5 * 0.02 / (2 * module.weight.numel()) ** 0.5
            assert_close(module.weight.std(), torch.tensor(0.02), atol=error, rtol=0)
        if isinstance(module, nn.BatchNorm2d):
            assert_close(module.weight.mean(), torch.tensor(1.0), atol=5 * 0.02 / module.weight.numel() ** 0.5, rtol=0)
            assert (module.weight != 1).all()
            assert (module.bias == 0).all()
