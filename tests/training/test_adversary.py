"""The game of tokenizer and critic: both rules in closed form, LeCam's memory, the critic of clips."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from training.adversary import Adversary, hinge_critic, hinge_tokenizer, soft_critic, soft_tokenizer
from training.discriminator import ClipDiscriminator

CLIP = {"video": (4, 8, 8), "patch": (2, 4, 4), "dim": 12, "depth": 2, "heads": 2}


def test_hinge_losses_in_closed_form() -> None:
    real, fake = torch.tensor([3.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 4.0])
    assert_close(hinge_critic(real, fake), torch.tensor(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 5) / 3)))
    assert_close(hinge_tokenizer(fake), torch.tensor(-2 / 3))
    assert hinge_critic(torch.tensor([1.0, 7.0]), torch.tensor([-1.0, -9.0])) == 0


def test_soft_losses_in_closed_form() -> None:
    """With targets 1 - a and b, E|n| 0.15 off but cut at 0.3, the cross-entropy is linear in the targets."""
    torch.manual_seed(0)
    real, fake = torch.full((200_000,), 0.7), torch.full((200_000,), -0.4)
    normal = torch.distributions.Normal(0.0, 1.0)
    two = torch.tensor(2.0)  # |n| above 2 is cut
    share = 2 * (1 - normal.cdf(two))
    mean = 0.15 * (2 * (normal.log_prob(torch.tensor(0.0)).exp() - normal.log_prob(two).exp()) + 2 * share)
    expected = -torch.tensor(0.7).sigmoid().log() + 0.7 * mean - torch.tensor(0.4).sigmoid().log() + 0.4 * mean
    assert_close(soft_critic(real, fake), expected, rtol=0, atol=1.5e-3)  # about 6 standard errors of 1.1 * 0.09 / 447
    assert_close(
        soft_tokenizer(torch.tensor([0.0, 2.0])), (torch.tensor(2.0).log() - torch.tensor(2.0).sigmoid().log()) / 2
    )


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * images.mean((1, 2, 3))[:, None]


def test_lecam_holds_the_logits_near_those_of_the_other_side_of_late() -> None:
    adversary = Adversary(Mean(), "hinge", lecam=0.5)
    images, reconstruction = torch.full((2, 3, 4, 4), 0.6), torch.full((2, 3, 4, 4), -0.2)
    for turn in range(3):
        memory = [side * (1 - 0.999**turn) for side in (0.6, -0.2)]
        loss, logs = adversary(images, reconstruction)
        kept = max(0.6 - memory[1], 0) ** 2 + max(memory[0] + 0.2, 0) ** 2
        assert_close(logs["lecam"], torch.tensor(kept))
        assert_close(loss, torch.tensor(0.5 * (0.4 + 0.8) + 0.5 * kept))
        assert_close(torch.stack((logs["logits_real"], logs["logits_fake"])), torch.tensor([0.6, -0.2]))
    assert set(adversary.state_dict()) == {"real", "fake", "critic.scale"}  # a checkpoint holds the memory


def test_the_critic_of_clips_has_the_published_size_and_tells_places_apart() -> None:
    """LARP's: 512 wide, 12 blocks, patches (4, 8, 8) of 16 frames of 128: a class token and 1024 patches."""
    with torch.device("meta"):
        published = ClipDiscriminator((16, 128, 128))
        assert published(torch.empty(2, 3, 16, 128, 128)).shape == (2, 1)
    block = 2 * 2 * 512 + 3 * 512**2 + 512**2 + 512 + 8 * 512**2 + 5 * 512
    assert sum(parameter.numel() for parameter in published.parameters()) == (
        768 * 512 + 512 + 512 + 12 * block + 2 * 512 + 513
    )
    torch.manual_seed(0)
    critic = ClipDiscriminator(**CLIP).eval()
    clip = torch.rand(1, 3, 4, 8, 8) * 2 - 1
    patches = clip.clone()
    patches[..., :4], patches[..., 4:] = clip[..., 4:], clip[..., :4]  # the same patches at other places
    logits = critic(torch.cat((clip, patches, clip)))
    assert_close(logits[2], logits[0])
    assert (logits[1] - logits[0]).abs() > 1e-4


def test_the_critic_of_clips_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"patch \(2, 4, 3\) must divide video \(4, 8, 8\)"):
        ClipDiscriminator(**{**CLIP, "patch": (2, 4, 3)})
    with pytest.raises(ValueError, match=r"made for \(B, 3, \*\(4, 8, 8\)\)"):
        ClipDiscriminator(**CLIP)(torch.zeros(1, 3, 4, 8, 4))


def test_a_critic_of_clips_learns_to_tell_them() -> None:
    torch.manual_seed(0)
    adversary = Adversary(ClipDiscriminator(**CLIP), "soft", lecam=1e-3)
    optimizer = torch.optim.Adam(adversary.parameters(), 3e-3)
    still = torch.rand(8, 3, 1, 8, 8).expand(-1, -1, 4, -1, -1) * 2 - 1
    moving = torch.rand(8, 3, 4, 8, 8) * 2 - 1
    first = adversary(still, moving)[0]
    for _ in range(60):
        optimizer.zero_grad()
        adversary(still, moving)[0].backward()
        optimizer.step()
    last, logs = adversary(still, moving)
    assert last < 0.75 * first
    assert logs["logits_real"] > 0 > logs["logits_fake"]
