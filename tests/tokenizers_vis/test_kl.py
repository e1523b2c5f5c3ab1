"""The KL autoencoder: one place for the scale, the posterior's law, patches, refusals, the published size, training."""

import math

import pytest
import torch
from torch.testing import assert_close

from layers.keymap import CheckpointMismatch
from layers.record import UnknownName
from layers.spec import Grid
from tokenizers_vis import from_published
from tokenizers_vis.kl import KLTokenizer, kl16_from_published, kl_keys, patchify, unpatchify


def small(**changes: object) -> KLTokenizer:
    torch.manual_seed(0)
    sizes = {"channels": 4, "width": 8, "mult": (1, 2), "res_blocks": 1, "encoder_attention": (1,), "groups": 4}
    return KLTokenizer(**{"image_size": (16, 24), **sizes, **changes}).eval()


IMAGES = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_scale_is_applied_once_and_undone_once() -> None:
    plain, scaled = small(), small(scale=0.25)
    noise = torch.randn(2, 96, 4, generator=torch.Generator().manual_seed(2))
    assert_close(scaled.encode(IMAGES, noise=noise), 0.25 * plain.encode(IMAGES, noise=noise))
    assert_close(scaled.decode(scaled.encode(IMAGES)), plain.decode(plain.encode(IMAGES)))


def test_encode_with_noise_draws_from_the_posterior() -> None:
    tokenizer, noise = small(scale=0.5), torch.tensor([-1.0, 0.0, 1.0])
    posterior = tokenizer.posterior(IMAGES)
    for times in noise.tolist():
        given = torch.full((2, 96, 4), times)
        wanted = patchify(0.5 * (posterior.mean + times * (posterior.logvar / 2).exp()), 1)
        assert_close(tokenizer.encode(IMAGES, noise=given), wanted)


def test_kl_is_the_divergence_from_the_standard_normal() -> None:
    from torch.distributions import Normal, kl_divergence

    posterior = small().posterior(IMAGES)
    law = Normal(posterior.mean.double(), posterior.std.double())
    wanted = kl_divergence(law, Normal(torch.zeros(()).double(), torch.ones(()).double())).sum((1, 2, 3))
    assert_close(posterior.kl().double(), wanted, rtol=1e-5, atol=1e-5)


def test_patches_are_raster_and_channel_major_and_come_back() -> None:
    latent = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    tokens = patchify(latent, 2)
    assert tokens.shape == (2, 6, 12)
    assert_close(tokens[0, 4], latent[0, :, 2:4, 2:4].flatten())
    assert_close(unpatchify(tokens, 2, Grid(1, 2, 3)), latent)


def test_larger_patches_hold_the_same_latent() -> None:
    one, two = small(), small(patch=2)
    assert (two.spec.length, two.spec.channels) == (24, 16)
    latent = unpatchify(one.encode(IMAGES), 1, one.spec.layout)
    assert_close(two.encode(IMAGES), patchify(latent, 2))
    assert_close(two.decode(two.encode(IMAGES)), one.decode(one.encode(IMAGES)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_size": 18, "patch": 2}, "multiple of 4"),
        ({"width": 6}, "6 channels are not divisible into groups=4"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"encoder_attention": (2,)}, "attention at level 2 of 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small(**changes)


def test_pictures_and_tokens_of_another_shape_are_refused() -> None:
    tokenizer = small()
    with pytest.raises(ValueError, match=r"made for \(B, 3, 16, 24\)"):
        tokenizer.encode(IMAGES[..., :16])
    with pytest.raises(ValueError, match=r"decodes \(B, 96, 4\)"):
        tokenizer.decode(torch.zeros(2, 95, 4))


def test_published_layout_of_full_size_loads_with_no_key_left() -> None:
    with torch.device("meta"):
        network = KLTokenizer(256, encoder_attention=(4,), scale=0.2325)
    back = {str(ours): theirs for theirs, ours in _unrolled(network).items()}
    state = {back[name]: _their_shape(back[name], tensor) for name, tensor in network.state_dict().items()}
    assert len(state) == 312
    assert round(sum(math.prod(tensor.shape) for tensor in state.values()) / 1e6, 3) == 66.456  # as published
    loaded = kl16_from_published(state, {})
    assert loaded.spec.length == 256 and loaded.spec.channels == 16 and loaded.scale == 0.2325


def test_foreign_keys_and_arguments_are_named() -> None:
    state = {"encoder.conv_in.weight": torch.zeros(1), "loss.logvar": torch.zeros(1)}
    with pytest.raises(CheckpointMismatch, match=r"loss\.logvar"):
        from_published("kl16-vae", state, {})
    with pytest.raises(UnknownName, match="channels_mult"):
        from_published("kl16-vae", {}, {"channels_mult": 2})
    with pytest.raises(ValueError, match="double_z is False"):
        from_published("kl16-vae", {}, {"double_z": False})


def test_a_few_pictures_are_learned() -> None:
    tokenizer = small(image_size=16, groups=2).train()
    pictures = torch.nn.functional.interpolate(IMAGES[..., :4, :4], (16, 16), mode="bilinear")
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    errors = []
    for _ in range(60):
        again, parts = tokenizer(pictures)
        error = (again - pictures).square().mean()
        (error + 1e-4 * parts["kl"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.2 * errors[0]


def _unrolled(network: KLTokenizer) -> dict[str, str]:
    """Every name of theirs that fits a name of ours."""
    found = {}
    for theirs, ours in kl_keys(5).items():
        target = ours[0] if isinstance(ours, tuple) else str(ours)
        for j in range(3):
            if target.format(j=j) in network.state_dict():
                found[theirs.format(j=j)] = target.format(j=j)
    return found


def _their_shape(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Zeros that take no memory, a 1x1 convolution where their attention has one."""
    attends = ".attn" in name and name.endswith("weight") and ".norm." not in name
    shape = (*tensor.shape, 1, 1) if attends else tensor.shape
    return torch.zeros(()).expand(shape)
