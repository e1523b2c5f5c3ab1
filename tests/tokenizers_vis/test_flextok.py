"""FlexTok: prefixes, nested dropout, the dropped rows as one, guidance, noise by sample, training, published layouts."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from layers.flow import uniform_times
from layers.keymap import CheckpointMismatch, Join
from layers.noise import Noise
from layers.record import UnknownName
from layers.spec import Grid, TokenSpec
from tokenizers_vis import from_published
from tokenizers_vis.flextok import FlexTokTokenizer, kept_tokens, mode_times, projected_guidance
from tokenizers_vis.flextok_published import FLEXTOK_CONFIG, FLEXTOK_KEYS, header_config, read_config
from tokenizers_vis.kl import KLTokenizer
from tokenizers_vis.protocol import Tokenizer
from tokenizers_vis.quantizers import FSQ, ResidualQuantizer

TOKENS = 6


def small(randomised: bool = True, **changes: Any) -> FlexTokTokenizer:
    """Of 8 x 16 pictures, 4 x 8 cells, 2 x 4 patches; float64. randomised: every parameter, zero gates too."""
    torch.manual_seed(0)
    autoencoder = KLTokenizer((8, 16), channels=2, width=4, mult=(1, 2), res_blocks=1, encoder_attention=(), groups=2)
    sizes = {"encoder_dim": 16, "encoder_depth": 2, "decoder_dim": 24, "decoder_depth": 2, "head_dim": 8}
    sizes |= {"tokens": TOKENS, "frequencies": 16, "steps": 2, "guidance": 3.0}
    made = FlexTokTokenizer(autoencoder, FSQ([5, 4, 3]), **{**sizes, **changes})
    if randomised:
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
    assert tokens.shape == (3, TOKENS) and tokenizer.prefixes == tuple(range(1, TOKENS + 1))
    for length in tokenizer.prefixes:
        assert torch.equal(tokenizer.encode(pictures(), length=length), tokens[:, :length])
    assert torch.equal(torch.cat([tokenizer.encode(one[None]) for one in pictures()]), tokens)


def test_a_token_depends_on_no_later_register() -> None:
    tokenizer = small()
    cells = tokenizer.autoencoder.encode(pictures())
    before = tokenizer.encoder(cells)
    tokenizer.encoder.registers.data[4:] *= -1
    after = tokenizer.encoder(cells)
    assert_close(after[:, :4], before[:, :4], rtol=0, atol=1e-12)
    assert ((after - before)[:, 4:].abs().amax(-1) > 1e-3).all()


def test_ids_stand_for_the_codes_that_the_decoder_gets() -> None:
    tokenizer = small()
    tokens = tokenizer.encode(pictures())
    assert_close(tokenizer.embed(tokens), tokenizer.codebook()[tokens])


# ---- decoding


def whole_rows(tokenizer: FlexTokTokenizer, tokens: Tensor, keep: int) -> Tensor:
    """All K rows of the decoder, written out: what is dropped is one learned vector, over and over."""
    decoder = tokenizer.decoder
    rows = decoder.codes(tokenizer.embed(tokens).double()) + decoder.places
    rows[:, keep:] = decoder.dropped
    return rows


@pytest.mark.parametrize("keep", range(1, TOKENS + 1))
def test_dropped_rows_counted_once_are_all_the_rows(keep: int) -> None:
    tokenizer, x, t = small(), normal(3, 32, 2), torch.tensor([0.1, 0.5, 1.0])
    tokens = tokenizer.encode(pictures())
    wanted = tokenizer.decoder(x, t, whole_rows(tokenizer, tokens, keep), None)
    assert_close(tokenizer.velocity(x, t, tokens[:, :keep]), wanted, rtol=0, atol=1e-10)
    present = torch.arange(TOKENS).expand(3, -1) < keep
    assert_close(tokenizer.velocity(x, t, tokens, present), wanted, rtol=0, atol=1e-10)


def test_without_condition_all_rows_are_the_null() -> None:
    tokenizer, x, t = small(), normal(3, 32, 2), torch.tensor([0.1, 0.5, 1.0])
    wanted = tokenizer.decoder(x, t, tokenizer.decoder.null.expand(3, TOKENS, -1), None)
    assert_close(tokenizer.velocity(x, t, None), wanted, rtol=0, atol=1e-10)


def test_every_length_decodes_alone_and_in_one_batch() -> None:
    tokenizer = small()
    tokens, lengths = tokenizer.encode(pictures()[:1]).expand(TOKENS, -1), torch.arange(1, TOKENS + 1)
    noise = tokenizer.start(Noise(3, torch.arange(TOKENS)))
    present = torch.arange(TOKENS) < lengths[:, None]
    ragged = tokenizer.decode(tokens.where(present, 0), present=present, noise=noise)
    for i, n in enumerate(lengths.tolist()):
        alone = tokenizer.decode(tokens[:1, :n], noise=noise[i : i + 1])
        assert alone.shape == (1, 3, 8, 16)
        assert_close(ragged[i : i + 1], alone, rtol=0, atol=1e-9)
    assert (ragged[1:] - ragged[:-1]).abs().amax((1, 2, 3)).min() > 1e-3


def test_pictures_and_noise_do_not_depend_on_the_batch() -> None:
    tokenizer = small()
    tokens = tokenizer.encode(pictures())
    noise = tokenizer.start(Noise(5, torch.tensor([4, 0, 9])))
    assert torch.equal(tokenizer.start(Noise(5, torch.tensor([9, 4]))), noise[[2, 0]])
    assert (tokenizer.start(Noise(6, torch.tensor([4]))) - noise[:1]).abs().min() > 0
    together = tokenizer.decode(tokens, noise=noise)
    alone = torch.cat([tokenizer.decode(tokens[i : i + 1], noise=noise[i : i + 1]) for i in range(3)])
    assert_close(together, alone, rtol=0, atol=1e-9)


def test_without_noise_a_picture_is_a_function_of_its_tokens() -> None:
    tokenizer = small()
    tokens = tokenizer.encode(pictures())
    both = tokenizer.decode(tokens)
    assert_close(both, tokenizer.decode(tokens.flip(0)).flip(0), rtol=0, atol=1e-9)


def test_guidance_may_change_with_the_time_and_one_is_none() -> None:
    tokenizer, noise = small(), normal(3, 32, 2)
    tokens = tokenizer.encode(pictures())
    asked = []

    def scale(t: float) -> float:
        asked.append(t)
        return 3.0

    plain = tokenizer.flow(tokens, noise, steps=4, guidance=3.0, projected=False)
    assert_close(tokenizer.flow(tokens, noise, steps=4, guidance=scale, projected=False), plain)
    assert asked == uniform_times(4)[:-1]
    one = tokenizer.flow(tokens, noise, guidance=1.0)
    assert_close(tokenizer.flow(tokens, noise, guidance=lambda t: 1.0, projected=False), one)
    x = noise
    for t in (1.0, 0.5):
        x = x - 0.5 * tokenizer.velocity(x, torch.full((3,), t, dtype=torch.float64), tokens)
    assert_close(one, x)


# ---- laws


def test_projected_guidance_by_hand() -> None:
    conditional, null = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, -3.0], [0.0, 0.0]])
    # differences (1, 3) of length sqrt(10) and (0, 1); the second lies along its conditional
    guided, running = projected_guidance(conditional, null, 5.0)
    assert_close(running, conditional - null)
    assert_close(guided, torch.tensor([[2.0, 4 * 3 * 2.5 / 10**0.5], [0.0, 1.0]]))
    guided, running = projected_guidance(conditional, null, 5.0, running)
    assert_close(running, 0.5 * (conditional - null))  # now (0.5, 1.5), which is not cut
    assert_close(guided, torch.tensor([[2.0, 4 * 1.5], [0.0, 1.0]]))


def test_projected_guidance_with_everything_kept_is_plain_guidance() -> None:
    v, u = normal(2, 2, 5, 4)
    guided, _ = projected_guidance(v, u, 3.0, normal(2, 5, 4), momentum=0.0, threshold=0.0, parallel=1.0)
    assert_close(guided, u + 3.0 * (v - u))
    guided, _ = projected_guidance(v, u, 3.0)
    assert_close(((guided - v) * v).sum((1, 2)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert ((guided - v).flatten(1).norm(dim=1) <= 2 * 2.5 + 1e-9).all()


def test_nested_dropout_keeps_as_its_law_says() -> None:
    uniform = (torch.arange(48) + 0.5) / 48  # every law has its exact frequencies here
    counts = {
        law: kept_tokens(law, uniform, 8).bincount(minlength=9).tolist() for law in ("uniform", "powers", "rounded")
    }
    assert counts["uniform"] == [0] + [6] * 8
    assert counts["powers"] == [0, 12, 12, 0, 12, 0, 0, 0, 12]
    assert counts["rounded"] == [0, 6, 6, 0, 12, 0, 0, 0, 24]
    assert kept_tokens("rounded", uniform, 6).max() == 6
    with pytest.raises(ValueError, match="power of two, not 6"):
        kept_tokens("powers", uniform, 6)
    with pytest.raises(ValueError, match="keep_law 'zipf' is not known; known: uniform, powers, rounded"):
        kept_tokens("zipf", uniform, 8)


def test_times_keep_their_ends_and_move_to_the_middle() -> None:
    uniform = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert_close(mode_times(uniform, 0.0), 1 - uniform)
    times = mode_times(uniform, 0.25)
    assert_close(times[[0, 50, 100]], torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), rtol=0, atol=1e-12)
    assert (times.diff() < 0).all() and (times - 0.5).abs().mean() < (uniform - 0.5).abs().mean()


# ---- training


def test_the_loss_is_the_error_of_the_velocity_at_the_given_draws() -> None:
    tokenizer = small()
    noise, posterior = normal(3, 32, 2), torch.zeros(3, 32, 2, dtype=torch.float64)
    t, keep = torch.tensor([0.2, 0.9, 0.4], dtype=torch.float64), torch.tensor([1, 4, TOKENS])
    null = torch.tensor([False, False, True])
    none, parts = tokenizer(pictures(), posterior_noise=posterior, noise=noise, t=t, keep=keep, null=null)
    assert none is None
    cells, tokens = tokenizer.autoencoder.encode(pictures()), tokenizer.encode(pictures())
    assert torch.equal(parts["ids"], tokens)
    errors = []
    for i in range(3):
        x = (1 - t[i]) * cells[i : i + 1] + t[i] * noise[i : i + 1]
        given = None if null[i] else tokens[i : i + 1, : keep[i]]
        errors.append((noise[i] - cells[i] - tokenizer.velocity(x, t[i : i + 1], given)[0]).square().mean())
    assert_close(parts["flow"].double(), torch.stack(errors).mean(), rtol=1e-6, atol=0)


def test_the_autoencoder_rests_and_everything_else_learns() -> None:
    tokenizer = small().train()
    assert not tokenizer.autoencoder.training and tokenizer.encoder.training
    draws = {"keep": torch.tensor([1, 4, TOKENS]), "null": torch.tensor([False, False, True])}
    _, parts = tokenizer(pictures(), **draws)
    parts["flow"].backward()
    for name, parameter in tokenizer.named_parameters():
        if name.startswith("autoencoder."):
            assert not parameter.requires_grad and parameter.grad is None
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


class Pixels(Tokenizer):
    """An autoencoder that loses nothing: a cell is a pixel."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.spec = TokenSpec(Grid(1, height, width), decoded=(1, height, width), channels=3)

    def encode(self, images: Tensor, *, noise: Tensor | None = None) -> Tensor:
        return rearrange(images, "b c h w -> b (h w) c")

    def decode(self, tokens: Tensor, **_: Any) -> Tensor:
        return rearrange(tokens, "b (h w) c -> b c h w", h=self.spec.decoded[1])

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return images, {}


def test_training_begins_with_registers_that_tell_pictures_apart_and_reach_the_patches() -> None:
    tokenizer = small(randomised=False)
    tokens = tokenizer.quantizer.assign(tokenizer.encoder(normal(3, 32, 2)))
    assert len(tokens.unique(dim=0)) == 3
    x, t = normal(3, 32, 2), torch.tensor([0.1, 0.5, 1.0])
    assert tokenizer.velocity(x, t, tokens).abs().max() == 0  # the published start: no velocity yet
    torch.nn.init.normal_(tokenizer.decoder.readout.weight)
    assert (tokenizer.velocity(x, t, tokens) - tokenizer.velocity(x, t, tokens.flip(0))).abs().amax((1, 2))[0] > 1e-3


def test_a_few_pictures_are_learned() -> None:
    torch.manual_seed(1)
    sizes = {"encoder_dim": 16, "encoder_depth": 1, "decoder_dim": 32, "decoder_depth": 2, "head_dim": 16}
    tokenizer = FlexTokTokenizer(
        Pixels(4, 4), FSQ([5, 5]), tokens=2, steps=8, guidance=1.0, drop_condition=0.0, **sizes
    )
    images = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])  # left and right half
    images = images.repeat_interleave(2, 1)[:, None, None].expand(-1, 3, 4, -1)
    optimizer = torch.optim.Adam(tokenizer.parameters(), 5e-3)
    losses = []
    for _ in range(80):
        _, parts = tokenizer(images.repeat(16, 1, 1, 1))
        parts["flow"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(parts["flow"].detach()))
    assert abs(losses[0] - 2) < 0.2  # nothing is said at first: the noise and the picture, of variance 1 each
    assert sum(losses[-20:]) / 20 < 0.3 * losses[0]
    tokens = tokenizer.eval().encode(images)
    assert len({tuple(row) for row in tokens.tolist()}) > 1


# ---- refusals


def test_parts_that_do_not_fit_are_refused_with_both_sides() -> None:
    for changes, said in (
        ({"patch": 3}, "4 x 8 cells are not divisible by patch=3"),
        ({"head_dim": 16}, "head_dim=16 must divide encoder_dim=16 and decoder_dim=24"),
        ({"table": (2, 3)}, "places for 2 x 3 patches, the picture has 2 x 4"),
        ({"keep_law": "powers"}, "power of two, not 6"),
        ({"time_law": "cosine"}, "'cosine' is not known"),
    ):
        with pytest.raises(ValueError, match=said):
            small(**changes)
    with pytest.raises(ValueError, match=r"continuous tokens on a grid, FlexTokTokenizer makes .*vocab_size=60"):
        FlexTokTokenizer(small(), FSQ([5, 4, 3]))
    residual = ResidualQuantizer(lambda: FSQ([5, 4, 3]), 2)
    with pytest.raises(ValueError, match="ResidualQuantizer gives 2 ids a vector, not 1"):
        FlexTokTokenizer(small().autoencoder, residual)


def test_tokens_and_pictures_of_another_shape_are_refused() -> None:
    tokenizer, tokens = small(), torch.zeros(2, 3, dtype=torch.int64)
    for wrong in (torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 7, dtype=torch.int64), tokens[0]):
        with pytest.raises(ValueError, match=r"decodes \(B, n\), n from 1 to 6"):
            tokenizer.decode(wrong)
    with pytest.raises(ValueError, match="ids from 0 to 60, the codebook has 0 to 59"):
        tokenizer.decode(tokens + torch.tensor([0, 60, 1]))
    for rows in ([[1, 0, 1], [1, 1, 1]], [[0, 0, 0], [1, 1, 1]], [[1, 1], [1, 1]]):
        with pytest.raises(ValueError, match="must be True for a prefix of 1 token or more"):
            tokenizer.decode(tokens, present=torch.tensor(rows, dtype=torch.bool))
    for length in (0, 7):
        with pytest.raises(ValueError, match=f"length is {length}, there are 1 to 6 tokens"):
            tokenizer.encode(pictures(), length=length)
    with pytest.raises(ValueError, match=r"made for \(B, 3, 8, 16\)"):
        tokenizer.encode(pictures()[..., :8])


# ---- published files

SIZES = {  # millions of encoder, decoder, autoencoder
    "d12_d12": ({}, (85, 172, 84)),
    "d18_d18": ({"enc_dim": 1152, "enc_depth": 18, "dec_dim": 1152, "dec_depth": 18}, (287, 579, 84)),
    "d18_d28": ({"enc_dim": 1152, "enc_depth": 18, "dec_dim": 1792, "dec_depth": 28}, (287, 2170, 84)),
}


def layout(config: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors that take no memory, under the original names, with the original shapes."""
    c = FLEXTOK_CONFIG | config
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.module_dict.enc_register_module.registers": (c["num_registers"], c["enc_dim"])
    }
    patch, codes = 4 * c["latent_channels"], len(c["fsq_levels"])
    for room, short, dim, depth in (
        ("encoder", "enc", c["enc_dim"], c["enc_depth"]),
        ("decoder", "dec", c["dec_dim"], c["dec_depth"]),
    ):
        at = f"{room}.module_dict.{short}_"
        hidden = int(2 * int(4 * dim) / 3)
        places, embed = (
            ("posemb_module", "patch_emb") if short == "enc" else ("patches_posemb_module", "noise_patch_emb")
        )
        shapes |= {
            f"{at}{places}.posembs": (1, dim, 16, 16),
            f"{at}{embed}.patch_proj.weight": (dim, patch),
            f"{at}{embed}.patch_proj.bias": (dim,),
        }
        for i in range(depth):
            block = f"{at}transformer.blocks.{i}"
            shapes |= {f"{block}.attn.{name}.weight": (dim, dim) for name in ("wq", "wk", "wv", "proj")}
            shapes |= {f"{block}.mlp.{name}.weight": (hidden, dim) for name in ("fc1", "fc3")}
            shapes[f"{block}.mlp.fc2.weight"] = (dim, hidden)
            if short == "dec":
                shapes |= {
                    f"{block}.adaLN_modulation.1.weight": (12 * dim, dim),
                    f"{block}.adaLN_modulation.1.bias": (12 * dim,),
                }
    at, dim = "encoder.module_dict.enc_", c["enc_dim"]
    shapes |= {f"{at}to_latents.proj.weight": (codes, dim), f"{at}to_latents.proj.bias": (codes,)}
    at, dim = "decoder.module_dict.dec_", c["dec_dim"]
    shapes |= {f"{at}from_latents.proj.weight": (dim, codes), f"{at}from_latents.proj.bias": (dim,)}
    shapes |= {f"{at}registers_posemb_module.posembs": (1, 1, dim, c["num_registers"])}
    shapes |= {f"{at}nested_dropout.dropout_mask_token": (dim,), f"{at}latent_dropout.nullcond": (dim,)}
    shapes |= {f"{at}time_embedder.mlp.0.weight": (dim, 256), f"{at}time_embedder.mlp.0.bias": (dim,)}
    shapes |= {f"{at}time_embedder.mlp.2.weight": (dim, dim), f"{at}time_embedder.mlp.2.bias": (dim,)}
    shapes |= {
        f"{at}to_patches.adaLN_modulation.1.weight": (2 * dim, dim),
        f"{at}to_patches.adaLN_modulation.1.bias": (2 * dim,),
    }
    shapes |= {f"{at}to_patches.proj.weight": (patch, dim), f"{at}to_patches.proj.bias": (patch,)}
    with torch.device("meta"):
        autoencoder = KLTokenizer(256, width=128, mult=(1, 2, 4, 4), encoder_attention=())
    shapes |= {f"vae.vae.{name}": tuple(tensor.shape) for name, tensor in autoencoder.network.state_dict().items()}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("name", SIZES)
def test_published_layouts_of_full_size_load_with_no_key_left(name: str) -> None:
    config, millions = SIZES[name]
    state = layout(config)
    for part, wanted in zip(("encoder.", "decoder.", "vae."), millions, strict=True):
        found = sum(math.prod(tensor.shape) for key, tensor in state.items() if key.startswith(part)) / 1e6
        assert abs(found - wanted) <= 1, (part, found)
    repa = {f"decoder.module_dict.dec_repa.{key}": torch.zeros(1) for key in ("mlp.0.weight", "out_proj.weight")}
    loaded = from_published(
        "flextok",
        {**state, **repa, "vae.logvar": torch.empty((), device="meta")},
        {**config, "vae_scaling_factor": 0.5},
    )
    assert loaded.spec.length == 256 and loaded.spec.vocab_size == 64000 and loaded.spec.decoded == (1, 256, 256)
    assert loaded.autoencoder.scale == 0.5 and not loaded.training


def test_foreign_keys_and_arguments_are_named() -> None:
    with pytest.raises(CheckpointMismatch, match=r"encoder\.module_dict\.enc_extra\.weight"):
        from_published("flextok", {"encoder.module_dict.enc_extra.weight": torch.zeros(1)}, {"vae_scaling_factor": 1.0})
    with pytest.raises(UnknownName, match="enc_width"):
        from_published("flextok", {}, {"enc_width": 3})
    with pytest.raises(ValueError, match="vae_scaling_factor is not given"):
        from_published("flextok", layout({}), {})


def config_json() -> dict[str, Any]:
    """The published config.json in small: modules by class path, values handed on under keys."""

    def modules(**parts: dict[str, Any]) -> dict[str, Any]:
        named = {name: {"_target_": f"flextok.model.{name}", **part} for name, part in parts.items()}
        return {"_target_": "flextok.model.utils.wrappers.SequentialModuleDictWrapper", "module_dict": named}

    return {
        "_target_": "flextok.flextok_wrapper.FlexTok",
        "vae": {"_target_": "flextok.vae_wrapper.StableDiffusionVAE", "latent_channels": 4, "scaling_factor": 0.3},
        "encoder": modules(
            enc_patch_emb={"patch_sizes": [2, 2], "dim": 32},
            enc_posemb_module={"max_sizes": [8, 8]},
            enc_register_module={"n_min": 16, "n_max": 16},
            enc_seq_packer={"mask_mode": "causal_last", "pad_to_multiple": 128},
            enc_transformer={"dim": 32, "depth": 2, "head_dim": 16, "use_act_checkpoint": True},
        ),
        "decoder": modules(
            dec_registers_posemb_module={"posemb_type": "learnable_sum", "max_sizes": [16]},
            dec_nested_dropout={"size_sampling_mode": "uniform_pow2"},
            dec_latent_dropout={"dropout_prob": 0.1},
            dec_patches_posemb_module={"max_sizes": [8, 8]},
            dec_seq_packer={"mask_mode": "full", "per_subseq_embs": True},
            dec_time_embedder={"max_timestep": 1.0},
            dec_transformer={"dim": 48, "depth": 3, "head_dim": 16, "adaLN_expansion": 2},
        ),
        "regularizer": {"_target_": "flextok.regularizers.quantize_fsq.FSQ", "levels": [5, 5, 5]},
        "flow_matching_noise_module": {"ln": False, "mode_scale": 0.25},
    }


def test_numbers_of_config_json_are_read_from_a_file_or_its_header(tmp_path: Path) -> None:
    found = read_config(config_json())
    assert found == {
        **{"enc_dim": 32, "enc_depth": 2, "dec_dim": 48, "dec_depth": 3, "head_dim": 16, "patch_size": 2, "grid": 8},
        **{"num_registers": 16, "latent_channels": 4, "fsq_levels": [5, 5, 5], "frequency_embedding_size": 256},
        **{"max_timestep": 1.0, "vae_scaling_factor": 0.3, "size_sampling_mode": "uniform_pow2", "dropout_prob": 0.1},
        **{"ln": False, "mode_scale": 0.25, "image_size": None},
    }
    save_file(
        {"a": torch.zeros(1)}, tmp_path / "a.safetensors", {key: str(part) for key, part in config_json().items()}
    )
    assert read_config(header_config(tmp_path / "a.safetensors")) == found
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors", {"encoder": "{'dim': open('x')}"})
    with pytest.raises(ValueError, match="something else than plain values"):
        header_config(tmp_path / "b.safetensors")


def test_a_wiring_that_no_published_file_has_is_named() -> None:
    for room, module, key, value, said in (
        ("encoder", "enc_seq_packer", "mask_mode", "full", "enc_seq_packer.mask_mode is 'full' .* 'causal_last'"),
        ("decoder", "dec_transformer", "adaLN_expansion", 1, "adaLN_expansion is 1"),
        ("encoder", "enc_patch_emb", "patch_sizes", [2, 4], r"patch_sizes is \[2, 4\]"),
    ):
        content = config_json()
        content[room]["module_dict"][module][key] = value
        with pytest.raises(ValueError, match=said):
            from_published("flextok", {}, content)
    content = config_json()
    del content["decoder"]["module_dict"]["dec_nested_dropout"]
    with pytest.raises(ValueError, match=r"no decoder\.dec_nested_dropout"):
        read_config(content)


def test_halves_of_the_modulation_and_parts_of_a_join_go_where_they_are_read() -> None:
    block = "decoder.module_dict.dec_transformer.blocks.{i}"
    assert [FLEXTOK_KEYS[f"{block}.attn.{name}.weight"] for name in ("wq", "wk", "wv")] == [
        Join("decoder.blocks.{i}.attention.qkv.weight", part, 3) for part in range(3)
    ]
    tokenizer = small()
    seen = tokenizer.decoder.blocks[0]
    x, t = normal(3, 32, 2), torch.tensor([0.1, 0.5, 1.0])
    tokens = tokenizer.encode(pictures())
    before = tokenizer.velocity(x, t, tokens)
    with (
        torch.no_grad()
    ):  # the last block's part for registers reaches no patch but through attention: its MLP gate never
        tokenizer.decoder.blocks[-1].modulation.project.bias[7 * 24 : 8 * 24] += 1
    assert torch.equal(tokenizer.velocity(x, t, tokens), before)
    with torch.no_grad():
        seen.modulation.project.bias[7 * 24 : 8 * 24] += 1
    assert (tokenizer.velocity(x, t, tokens) - before).abs().max() > 1e-6
