"""LARP's prior: a small causal transformer that guesses the next code of a clip while its tokenizer learns.

Source: Wang et al. 2024, "LARP: Tokenizing Videos with a Learned Autoregressive Generative Prior" (arXiv:2410.21264,
sec. 3.3). Its loss reaches the encoder, which learns to put codes into an order that can be guessed; then it is dropped.

Dims: B batch, n tokens, C channels of a code, D width, V codes.

What to know:
- it reads and says unit vectors, not ids: a guess is compared with every code by its cosine, and that is its logit;
- the first round reads the true codes. For a further round some of them, each with the same growing probability, are
  replaced by codes drawn from the round before (scheduled sampling): so it also learns to go on from its own mistakes;
- the codebook learns nothing from it, the encoder does, through every code that is read.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from layers.keymap import Join, Target, translate
from layers.record import look_up
from sampling.sampler import inverse_cdf
from training.loop import Through


class LARPPrior(nn.Module):
    """codes (B, n, C) of `tokens` tokens -> what is guessed of them, (B, n, C); the first is handed through.

    dropout: of attention, of both residual branches and of what enters. rounds: forwards a loss; share, ramp: the
    probability that a code is replaced between rounds rises from 0 to `share` in the first `ramp` of all steps (0: at once).
    every_round: the loss is the mean over the rounds, else the last one's. temperature: of the logits. normalize: codes and
    guesses are brought to length 1.
    """

    def __init__(
        self,
        tokens: int,
        channels: int,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        dropout: float = 0.1,
        rounds: int = 2,
        share: float = 0.5,
        ramp: float = 0.3,
        every_round: bool = True,
        temperature: float = 1.0,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.rounds, self.share, self.ramp, self.every_round = rounds, share, ramp, every_round
        self.temperature, self.normalize = temperature, normalize
        self.embed = nn.Linear(channels, dim)
        self.position = nn.Parameter(torch.randn(tokens, dim) * 0.02)
        self.drop = nn.Dropout(dropout)
        block = partial(Block, qkv_bias=True, proj_drop=dropout, attn_drop=dropout)
        self.blocks = nn.ModuleList(
            [block(dim, heads, norm_layer=partial(nn.LayerNorm, eps=1e-5)) for _ in range(depth)]
        )
        for made in self.blocks:
            made.mlp.drop1 = nn.Identity()  # dropout stands at the end of a branch alone
        self.norm = nn.LayerNorm(dim)
        self.readout = nn.Linear(dim, channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, codes: Tensor) -> Tensor:
        given = codes[:, :-1]
        x = self.drop(self.embed(given) + self.position[: given.shape[1]])
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        guesses = torch.cat((codes[:, :1], self.readout(self.norm(x))), dim=1)
        return functional.normalize(guesses, dim=-1) if self.normalize else guesses

    def logits(self, codes: Tensor, codebook: Tensor) -> Tensor:
        """codes (B, n, C), codebook (V, C) -> (B, n - 1, V): row i is the law of token i + 1, given those before it."""
        return (self(codes)[:, 1:] @ codebook.to(codes.dtype).t()).float() / self.temperature

    def replaced(self, progress: float) -> float:
        """The probability that a code is replaced between two rounds. progress: of the steps of training, 0 to 1."""
        return self.share if progress >= self.ramp else self.share * progress / self.ramp

    def loss(
        self,
        codes: Tensor,
        ids: Tensor,
        codebook: Tensor,
        progress: float,
        *,
        mixing: Tensor | None = None,
        drawing: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats a token. codes (B, n, C) with a gradient to the encoder, ids int64 (B, n), codebook
        (V, C), whose gradient is cut.

        mixing (B, n - 1): uniforms in [0, 1), below `replaced(progress)` where a code is replaced, the same in every
        round; drawing (rounds - 1, B, n - 1): uniforms that say by which. Drawn when None.
        """
        codebook, labels = codebook.detach(), ids[:, 1:]
        size = labels.shape
        mixing = torch.rand(size, device=ids.device) if mixing is None else mixing
        drawing = torch.rand(self.rounds - 1, *size, device=ids.device) if drawing is None else drawing
        mixed = (mixing < self.replaced(progress))[..., None]
        given, losses = codes, []
        for turn in range(self.rounds):
            last = turn == self.rounds - 1
            with nullcontext() if self.every_round or last else torch.no_grad():
                logits = self.logits(given, codebook)
            if self.every_round or last:
                losses.append(functional.cross_entropy(logits.movedim(-1, 1), labels))
            if not last:
                drawn = codebook[inverse_cdf(logits.detach().double().softmax(-1), drawing[turn].double())].to(
                    codes.dtype
                )
                given = torch.cat((codes[:, :1], torch.where(mixed, drawn, codes[:, 1:])), dim=1)
        return torch.stack(losses).mean()


class WithPrior(Through):
    """A tokenizer and the prior that learns beside it, as one module to train.

    images -> what the tokenizer's forward gives, with one more term "prior" in place of the "codes" that it is made of.
    Raises ValueError for a tokenizer without these.
    """

    def __init__(self, tokenizer: nn.Module, prior: LARPPrior) -> None:
        super().__init__(tokenizer, self._with_term)
        self.prior = prior

    def _with_term(self, images: Tensor, progress: float) -> tuple[Tensor | None, dict[str, Any]]:
        reconstruction, parts = self.module(images)
        if "codes" not in parts:
            raise ValueError(
                f"a prior reads the codes of a tokenizer, {type(self.module).__name__} gives {sorted(parts)}"
            )
        codes = parts.pop("codes")
        parts["prior"] = self.prior.loss(codes, parts["ids"], self.module.codebook(), progress)
        return reconstruction, parts


# ---- published weights

SIZES = {  # depth, heads, width
    "gptc-L": (24, 16, 1024),
    "gptc-B": (12, 12, 768),
    "gptc-M": (12, 8, 512),
    "gptc-S": (12, 6, 384),
    "gptc-XS": (6, 6, 384),
    "gptc-XXS": (6, 4, 256),
}
CONFIG: dict[str, Any] = {  # of the section prior_model
    "name": None,
    "n_rounds": 2,
    "use_mix_ss": True,
    "mix_ss_max_ratio": 0.5,
    "mix_ss_peak_steps_ratio": 0.3,
    "avg_loss_over_rounds": True,
    "no_grad_before_last_round": False,
    "no_dropout": False,
    "latent_ce_temperature": 1.0,
    "args": {},
}
ARGUMENTS: dict[str, Any] = {  # of its args
    "max_seq_len": 1024,
    "n_layer": None,
    "n_head": None,
    "n_embd": None,
    "l2_normalized": True,
    "embd_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.1,
    # the tokenizer says what these are; what follows them is not run by their code
    "n_ind": None,
    "n_classes": None,
    "detach_x": False,
    "detach_target": True,
    "fully_separated": False,
}


def _places(table: Tensor) -> Tensor:  # (1, n, D)
    return table.squeeze(0)


PRIOR_KEYS: dict[str, Target] = {  # theirs -> ours
    "prior_model.pos_emb": ("position", _places),
    **{
        f"prior_model.{theirs}.{part}": f"{ours}.{part}"
        for theirs, ours in {
            "input_proj": "embed",
            "blocks.{i}.ln1": "blocks.{i}.norm1",
            "blocks.{i}.attn.proj": "blocks.{i}.attn.proj",
            "blocks.{i}.ln2": "blocks.{i}.norm2",
            "blocks.{i}.mlp.0": "blocks.{i}.mlp.fc1",
            "blocks.{i}.mlp.2": "blocks.{i}.mlp.fc2",
            "ln_f": "norm",
            "head": "readout",
        }.items()
        for part in ("weight", "bias")
    },
    **{
        f"prior_model.blocks.{{i}}.attn.{name}.{part}": Join(f"blocks.{{i}}.attn.qkv.{part}", place, 3)
        for place, name in enumerate(("query", "key", "value"))
        for part in ("weight", "bias")
    },
}


def larp_prior_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> LARPPrior:
    """The prior in the tensors of a LARP tokenizer, under the constructor arguments of that tokenizer; in eval mode.

    Its size is that of its name, or n_layer, n_head and n_embd among its arguments. Raises UnknownName for an argument or
    a name it does not have, ValueError for rates of dropout that differ, CheckpointMismatch listing all keys that do not fit.
    """
    prior = config["prior_model"]
    for name in prior:
        look_up(name, CONFIG, "larp: prior_model key")
    prior = {**CONFIG, **prior}
    for name in prior["args"]:
        look_up(name, ARGUMENTS, "larp: prior_model.args key")
    given = {**ARGUMENTS, **prior["args"]}
    if given["n_layer"] is None:
        size = look_up(prior["name"], SIZES, "larp: prior_model")
    else:
        size = given["n_layer"], given["n_head"], given["n_embd"]
    rates = {0.0} if prior["no_dropout"] else {given[f"{place}_pdrop"] for place in ("embd", "resid", "attn")}
    if len(rates) > 1:
        raise ValueError(f"larp: the prior has one rate of dropout, the configuration says {sorted(rates)}")
    mixes = prior["use_mix_ss"]
    with init_empty_weights(include_buffers=False):  # no memory and no time for weights that are replaced at once
        model = LARPPrior(
            given["max_seq_len"],
            config["bottleneck"]["args"]["bottleneck_dim"],
            depth=size[0],
            heads=size[1],
            dim=size[2],
            dropout=rates.pop(),
            rounds=prior["n_rounds"],
            share=prior["mix_ss_max_ratio"] if mixes else 1.0,
            ramp=prior["mix_ss_peak_steps_ratio"] if mixes else 0.0,
            every_round=prior["avg_loss_over_rounds"] and not prior["no_grad_before_last_round"],
            temperature=prior["latent_ce_temperature"],
            normalize=given["l2_normalized"],
        )
    own = {key: tensor for key, tensor in state.items() if key.startswith("prior_model.")}  # beside the tokenizer's
    model.load_state_dict(translate(own, PRIOR_KEYS, model.state_dict()), assign=True)
    return model.float().eval()
