"""Conditions as prefix tokens: a class label as one token, text features as S tokens. Dropped rows get a null of their own."""

from dataclasses import replace

import torch
from timm.layers import GELUTanh, Mlp
from torch import Tensor, nn

from layers.spec import Condition


class LabelError(ValueError):
    """A class id that a model does not know."""


class LabelEmbedding(nn.Module):
    """label int64 (b,) -> (b, 1, dim). Row num_classes of the table is the null class, taken where keep is False.

    Raises ValueError for a condition without labels.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes, self.slots = num_classes, 1
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, condition: Condition) -> Tensor:
        label = condition.label
        if label is None:
            raise ValueError("this generator is class-conditional: the condition needs label (B,)")
        if condition.keep is not None:
            label = torch.where(condition.keep, label, self.num_classes)
        return self.table(label)[:, None]


class TextEmbedding(nn.Module):
    """text float (b, S, text_dim), S <= slots, padded on the left -> (b, S, dim), by a two-layer MLP.

    The null caption (slots, text_dim) replaces the features where keep is False; the text mask stays that of the text.
    """

    def __init__(self, text_dim: int, slots: int, dim: int) -> None:
        super().__init__()
        self.slots = slots
        self.mlp = Mlp(text_dim, dim, dim, act_layer=GELUTanh, bias=False)
        self.register_buffer("null", torch.randn(slots, text_dim) / text_dim**0.5)

    def forward(self, condition: Condition) -> Tensor:
        text = condition.text
        if text is None or text.shape[1] != self.slots:
            found = "no text" if text is None else f"{text.shape[1]} text positions"
            raise ValueError(
                f"this generator is text-conditional with {self.slots} positions: the condition has {found}"
            )
        if condition.keep is not None:
            text = torch.where(condition.keep[:, None, None], text, self.null.to(text.dtype))
        return self.mlp(text)


def check_labels(label: Tensor, num_classes: int) -> None:
    """Raises LabelError naming the first label outside [0, num_classes). Waits for the device: ask it once, at the door."""
    wrong = label[(label < 0) | (label >= num_classes)]
    if len(wrong):
        raise LabelError(f"class id {int(wrong[0])} is out of range: this model knows 0 to {num_classes - 1}")


def drop_condition(condition: Condition, keep: Tensor | None, share: float) -> Condition:
    """The condition with `keep` bool (B,): as given, else drawn so that a `share` of rows is dropped, else as it was."""
    if keep is None and share:
        keep = torch.rand(condition.rows, device=next(iter(condition.fields().values())).device) >= share
    return condition if keep is None else replace(condition, keep=keep)
