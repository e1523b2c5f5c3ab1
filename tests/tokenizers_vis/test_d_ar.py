"""D-AR: causal tokens, windows and prefixes, previews, the solver, noise by sample, training, the published layout."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from layers.flow import shifted
from layers.keymap import CheckpointMismatch
from layers.noise import Noise
from layers.record import UnknownName
from layers.spec import Sequence, TokenSpec
from tokenizers_vis import from_published
from tokenizers_vis.d_ar import DARTokenizer, adams
from tokenizers_vis.quantizers import EMAVectorQuantizer, ResidualQuantizer, VectorQuantizer

TOKENS, GROUPS = 12, 4


def small(**changes: Any) -> DARTokenizer:
    """Of 8 x 16 pictures, 2 x 4 patches read, 4 x 8 written; every parameter drawn, closed gates too; float64."""
    torch.manual_seed(0)
    sizes = {"encoder_patch": 4, "encoder_dim": 16, "encoder_depth": 2, "code_dim": 16, "code_depth": 2}
    sizes |= {"flow_patch": 2, "flow_dim": 24, "flow_depth": 2, "head_dim": 8, "tokens": TOKENS, "groups": GROUPS}
    quantizer = changes.pop("quantizer", None) or VectorQuantizer(20, 4, normalize=True)
    made = DARTokenizer((8, 16), quantizer, **{**sizes, **changes})
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made.double().eval()


def pictures(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 8, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# ---- tokens


def test_every_length_of_encode_is_the_beginning_of_the_longest() -> None:
    tokenizer = small()
    tokens = tokenizer.encode(pictures())
    assert tokenizer.spec == TokenSpec(Sequence(TOKENS), decoded=(1, 8, 16), vocab_size=20)
    assert tokenizer.prefixes == (3, 6, 9, 12) and tokens.shape == (3, 12)
    for length in tokenizer.prefixes:
        assert torch.equal(tokenizer.encode(pictures(), length=length), tokens[:, :length])
    assert torch.equal(torch.cat([tokenizer.encode(one[None]) for one in pictures()]), tokens)


def test_neither_vectors_nor_conditions_depend_on_what_is_later() -> None:
    tokenizer = small()
    codes = normal(2, TOKENS, 4)
    before, told = tokenizer.encoder(pictures(), TOKENS), tokenizer.condition(codes)
    codes[:, 5:] *= -1
    tokenizer.encoder.queries.data[5:] *= -1
    for a, b in ((before, tokenizer.encoder(pictures(), TOKENS)), (told, tokenizer.condition(codes))):
        assert_close(a[:, :5], b[:, :5], rtol=0, atol=1e-12)
        assert ((a - b)[:, 5:].abs().amax(-1) > 1e-3).all()
    assert_close(tokenizer.condition(codes[:, :7]), tokenizer.condition(codes)[:, :7], rtol=0, atol=1e-12)


def test_a_query_has_no_place_and_a_patch_has_one() -> None:
    """Queries exchanged with each other's mask aside: patches that are moved change what the first query says."""
    tokenizer = small()
    moved = pictures().roll(4, -1)  # whole patches, a column further
    assert (tokenizer.encoder(pictures(), 1) - tokenizer.encoder(moved, 1)).abs().max() > 1e-3
    tokenizer.encoder.rotary[:] = tokenizer.encoder.rotary[-1]  # no place for patches either: a set of them
    assert_close(tokenizer.encoder(pictures(), 1), tokenizer.encoder(moved, 1), rtol=0, atol=1e-10)


# ---- windows


@pytest.mark.parametrize(
    ("changes", "starts", "prefixes"),
    [
        ({}, {0.0: 0, 0.124: 0, 0.126: 3, 0.374: 3, 0.376: 6, 0.63: 9, 0.99: 9}, (3, 6, 9, 12)),
        ({"window": 6}, {0.0: 0, 0.2: 3, 0.5: 6, 0.99: 6}, (6, 9, 12)),
        ({"steps": 6}, {0.0: 0}, (3, 6, 9, 12)),
        ({"steps": 2}, {0.5: 6}, (3, 9, 12)),
        ({"tokens": 10, "groups": 4, "window": 4}, {0.25: 2, 0.5: 5, 0.75: 6}, (4, 6, 9, 10)),
    ],
)
def test_a_window_belongs_to_a_stretch_of_the_way(
    changes: dict[str, Any], starts: dict[float, int], prefixes: tuple[int, ...]
) -> None:
    tokenizer = small(**changes)
    places = torch.arange(tokenizer.spec.length, dtype=torch.float64)[None, :, None].expand(len(starts), -1, 1)
    seen = tokenizer.windows(places, torch.tensor(list(starts)))[..., 0]
    wanted = torch.tensor(list(starts.values()))[:, None] + torch.arange(tokenizer.window)
    assert torch.equal(seen, wanted.double())
    assert tokenizer.prefixes == prefixes


def test_a_picture_is_what_the_published_steps_make_of_its_windows() -> None:
    """Written out, in the time of the paper: from 0 for noise to 1."""
    tokenizer = small()
    tokens, x = tokenizer.encode(pictures()), normal(3, 3, 8, 16)
    seen = tokenizer.condition(tokenizer.embed(tokens))
    grid = [t / (t + 2 * (1 - t)) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    wanted, before = x, None
    for i in range(4):
        t = torch.full((3,), 1 - grid[i], dtype=torch.float64)
        v = -tokenizer.velocity(wanted, t, seen[:, 3 * i : 3 * i + 3])
        wanted = wanted + (grid[i + 1] - grid[i]) * (v if before is None else 1.5 * v - 0.5 * before)
        before = v
    assert_close(tokenizer.decode(tokens, noise=x), wanted / 0.6, rtol=0, atol=1e-10)


# ---- previews


def test_a_preview_reads_its_own_tokens_alone_and_jumps_to_the_end() -> None:
    tokenizer, noise = small(), normal(3, 3, 8, 16)
    tokens = tokenizer.encode(pictures())
    seen = tokenizer.condition(tokenizer.embed(tokens))
    start = torch.ones(1, dtype=torch.float64)
    one = (noise - tokenizer.velocity(noise, start, seen[:, :3])) / 0.6  # from noise to the end at once
    assert_close(tokenizer.decode(tokens[:, :3], noise=noise), one, rtol=0, atol=1e-10)
    previews = [tokenizer.decode(tokens[:, :n], noise=noise) for n in tokenizer.prefixes]
    for k, preview in enumerate(previews, 1):
        assert_close(tokenizer.pixels(tokens, noise, taken=k), preview, rtol=0, atol=1e-10)
    assert all((a - b).abs().amax((1, 2, 3)).min() > 1e-3 for a, b in pairwise(previews))


def test_rows_of_different_lengths_decode_as_they_would_alone() -> None:
    tokenizer = small()
    noise, tokens = tokenizer.start(Noise(3, torch.arange(5))), tokenizer.encode(pictures(5))
    lengths = torch.tensor([6, 12, 3, 6, 9])
    present = torch.arange(TOKENS) < lengths[:, None]
    ragged = tokenizer.decode(tokens.where(present, 0), present=present, noise=noise)
    for i, n in enumerate(lengths.tolist()):
        assert_close(ragged[i], tokenizer.decode(tokens[i : i + 1, :n], noise=noise[i : i + 1])[0], rtol=0, atol=1e-10)


def test_pictures_and_noise_do_not_depend_on_the_batch() -> None:
    tokenizer = small()
    tokens = tokenizer.encode(pictures())
    noise = tokenizer.start(Noise(5, torch.tensor([4, 0, 9])))
    assert noise.shape == (3, 3, 8, 16)
    assert torch.equal(tokenizer.start(Noise(5, torch.tensor([9, 4]))), noise[[2, 0]])
    together = tokenizer.decode(tokens, noise=noise)
    alone = torch.cat([tokenizer.decode(tokens[i : i + 1], noise=noise[i : i + 1]) for i in range(3)])
    assert_close(together, alone, rtol=0, atol=1e-10)
    assert_close(tokenizer.decode(tokens), tokenizer.decode(tokens.flip(0)).flip(0), rtol=0, atol=1e-10)


def test_the_solver_is_exact_where_the_velocity_is_linear_in_time() -> None:
    """From its second step on: the first is Euler's, and is off by stride^2 / 2 times the slope."""
    times = [1 - i / 8 for i in range(9)]
    found = adams(lambda x, i: torch.tensor(3 * times[i] - 1), torch.tensor(0.0), times)
    assert_close(found, torch.tensor(-3 / 2 + 1 - 3 / 2 / 64))
    stays = adams(lambda x, i: torch.tensor(2.0), torch.tensor(5.0), [1.0, 0.7, 0.1, 0.0])
    assert_close(stays, torch.tensor(3.0))


# ---- training


def test_training_terms_are_written_out() -> None:
    tokenizer = small().train()
    images, noise, progress = pictures(), normal(3, 3, 8, 16), torch.tensor([0.1, 0.45, 0.95], dtype=torch.float64)
    guess, parts = tokenizer(images, progress=progress, noise=noise)
    ends = torch.tensor([3, 9, 12])
    read = torch.arange(TOKENS) < ends[:, None]
    tokens = tokenizer.encode(images)
    assert torch.equal(parts["ids"], tokens.where(read, 0))
    unit = torch.nn.functional.normalize(tokenizer.encoder(images, TOKENS), dim=-1)
    each = (unit - tokenizer.embed(tokens)).square().mean(-1)
    assert_close(parts["commitment"], each[read].mean())
    assert_close(parts["codebook"], parts["commitment"])
    seen = tokenizer.windows(tokenizer.condition(tokenizer.embed(tokens)), progress)
    t = torch.tensor([shifted(1 - p, 2.0) for p in progress.tolist()], dtype=torch.float64)
    mix = t[:, None, None, None]
    x = (1 - mix) * 0.6 * images + mix * noise
    v = tokenizer.velocity(x, t, seen)
    assert_close(parts["flow"].double(), (noise - 0.6 * images - v).square().mean() / 0.36, rtol=1e-5, atol=0)
    assert_close(guess, (x - mix * v) / 0.6)
    assert parts["features"] is None


def test_the_loss_reaches_every_parameter_that_the_way_needs_and_no_token_behind_a_window() -> None:
    tokenizer = small(quantizer=EMAVectorQuantizer(20, 4), features_at=1).train()
    noise, progress = normal(3, 3, 8, 16), torch.full((3,), 0.2, dtype=torch.float64)  # windows are tokens 3 to 5
    guess, parts = tokenizer(pictures(), progress=progress, noise=noise)
    assert parts["features"].shape == (3, 24, 4, 8) and guess.shape == (3, 3, 8, 16)
    (parts["flow"] + parts["commitment"]).backward()
    assert {name for name, tensor in tokenizer.named_parameters() if tensor.grad is None} == set()
    moved = tokenizer.encoder.queries.grad.abs().amax(1) > 0
    assert moved.tolist() == [True] * 6 + [False] * 6
    assert tokenizer.last_layer.grad.abs().max() > 0


def test_what_is_drawn_in_training_follows_the_random_state() -> None:
    tokenizer = small().train()
    torch.manual_seed(4)
    first = tokenizer(pictures())[1]["flow"]
    assert tokenizer(pictures())[1]["flow"] != first
    torch.manual_seed(4)
    assert tokenizer(pictures())[1]["flow"] == first


# ---- refusals


def test_contradicting_sizes_and_parts_are_named() -> None:
    for changes, said in (
        ({"encoder_patch": 3}, "encoder_patch=3"),
        ({"flow_patch": 5}, "flow_patch=5"),
        ({"head_dim": 7}, "head_dim=7 must divide encoder_dim=16"),
        ({"window": 13}, "window is 13"),
        ({"timed_readout": True}, "needs shared_time"),
        ({"quantizer": ResidualQuantizer(lambda: VectorQuantizer(20, 4), 2)}, "2 ids a vector"),
    ):
        with pytest.raises(ValueError, match=said):
            small(**changes)


def test_wrong_tokens_and_images_are_named() -> None:
    tokenizer = small()
    tokens = tokenizer.encode(pictures())
    with pytest.raises(ValueError, match="got 4 tokens, takes 3, 6, 9, 12"):
        tokenizer.decode(tokens[:, :4])
    with pytest.raises(ValueError, match="got 5 tokens"):
        tokenizer.encode(pictures(), length=5)
    with pytest.raises(ValueError, match="ids from 20 to 20, the codebook has 0 to 19"):
        tokenizer.decode(torch.full((1, 3), 20))
    with pytest.raises(ValueError, match=r"got images \(3, 3, 8, 8\)"):
        tokenizer.encode(pictures()[..., :8])
    with pytest.raises(ValueError, match="present must be True for the first tokens"):
        tokenizer.decode(tokens, present=torch.arange(TOKENS).expand(3, -1) > 2)
    with pytest.raises(ValueError, match="3 tokens, step 2 of 4 sees 6"):
        tokenizer.pixels(tokens[:, :3], normal(3, 3, 8, 16), taken=2)


# ---- the published file


def layout(
    dim: int = 768, head: int = 64, depths: tuple[int, int, int] = (8, 8, 12), codes: int = 16384
) -> dict[str, Tensor]:
    """Tensors that take no memory, under the original names, with the original shapes."""

    def pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    def attention(name: str) -> dict[str, tuple[int, ...]]:
        shapes = pair(f"{name}.q_norm", head) | pair(f"{name}.k_norm", head)
        for part in ("q", "k", "v", "proj"):
            shapes |= pair(f"{name}.{part}", dim, dim)
        return shapes

    shapes = pair("patchify", dim, 3, 16, 16) | pair("query_linear", dim, 8)
    shapes |= {"query_embedding.weight": (1024, 8), "decoder_embedding.weight": (1024, dim)}
    shapes |= {"quant_in_conv.weight": (8, dim, 1, 1), "quant_out_conv.weight": (dim, 8, 1, 1)}
    shapes |= {"quantize.embedding.weight": (codes, 8), "quantize.codebook_used": (65536,)}
    for stack, depth in zip(("encoder_layers", "decoder_layers"), depths, strict=False):
        for i in range(depth):
            at = f"{stack}.{i}"
            shapes |= attention(f"{at}.attention") | pair(f"{at}.norm1", dim) | pair(f"{at}.norm2", dim)
            shapes |= pair(f"{at}.mlp.fc1", 4 * dim, dim) | pair(f"{at}.mlp.fc2", dim, 4 * dim)
            shapes |= {f"{at}.gate1": (dim,), f"{at}.gate2": (dim,)}
    net = "diff_decoder.net"
    shapes |= pair(f"{net}.cond_mlp", dim, dim) | pair(f"{net}.conv_in", dim, 192, 1, 1)
    shapes |= pair(f"{net}.conv_out", 192, dim, 1, 1)
    for i in range(depths[2]):
        at = f"{net}.blocks.{i}"
        shapes |= attention(f"{at}.attention") | attention(f"{at}.cross_attn")
        shapes |= pair(f"{at}.mlp.fc1", 4 * dim, dim) | pair(f"{at}.mlp.fc2", dim, 4 * dim)
        shapes |= pair(f"{at}.adaLN_modulation.1", 6 * dim, dim)
        for j in (0, 2):
            shapes |= pair(f"{at}.time_embed.mlp.{j}", dim, dim) | pair(f"{at}.cond_embed.{j}", dim, dim)
    for j, (a, b) in enumerate(((2048, dim), (2048, 2048), (768, 2048))):
        shapes |= pair(f"{net}.repa_out.{2 * j}", a, b)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_the_published_layout_loads_with_no_key_left_and_has_the_published_size() -> None:
    state = layout()
    counted = sum(math.prod(tensor.shape) for key, tensor in state.items() if key != "quantize.codebook_used") / 1e6
    head = sum(math.prod(tensor.shape) for key, tensor in state.items() if "repa_out" in key) / 1e6
    assert abs(counted - 307.4) < 0.05 and abs(counted - head - 300.1) < 0.05
    loaded = from_published("d-ar", state, {"diff_decoder": {"data_std": 0.6, "time_shift": 2}})
    assert loaded.spec == TokenSpec(Sequence(256), decoded=(1, 256, 256), vocab_size=16384)
    assert loaded.prefixes == tuple(range(32, 257, 32)) and not loaded.training
    own = sum(parameter.numel() for parameter in loaded.parameters()) / 1e6
    assert abs(own - (counted - head - (1024 - 256) * (8 + 768) / 1e6)) < 1e-6
    del state["quantize.codebook_used"]
    from_published("d-ar", {key: tensor for key, tensor in state.items() if "repa_out" not in key}, {})


def test_foreign_keys_arguments_and_variants_are_named() -> None:
    state = layout()
    with pytest.raises(CheckpointMismatch, match=r"diff_decoder\.net\.extra"):
        from_published("d-ar", {**state, "diff_decoder.net.extra": torch.zeros(1)}, {})
    with pytest.raises(CheckpointMismatch, match=r"flow\.modulation\.project\.bias is not in the checkpoint"):
        from_published("d-ar", state, {"diff_decoder": {"mlp_head": True, "share_time_encoding": True}})
    with pytest.raises(UnknownName, match="did you mean 'num_query_groups'"):
        from_published("d-ar", state, {"num_query_group": 8})
    with pytest.raises(UnknownName, match="time_shft"):
        from_published("d-ar", state, {"diff_decoder": {"time_shft": 2}})
    with pytest.raises(ValueError, match="vq_enable is False, must be True"):
        from_published("d-ar", state, {"vq_enable": False})
    with pytest.raises(ValueError, match="cond_dim=512 must be decoder_dim=768"):
        from_published("d-ar", state, {"diff_decoder": {"cond_dim": 512}})
