"""Reconstruction as TiTok and RAR score their tokenizers while they train: rFID, Inception Score of one split."""

from eval.gather import Splits
from eval.metrics import frechet, inception_score
from eval.protocol import Protocol

TITOK_RFID = Protocol(
    name="1d-tokenizer-rfid",
    source="Yu et al. 2024, arXiv:2406.07550; github.com/bytedance/1d-tokenizer evaluator/evaluator.py",
    metrics=(
        frechet("inception/tf1", "2048", "rfid"),
        inception_score("inception/tf1", Splits("logits_unbiased", splits=1), "one split, logits without bias"),
    ),
    count=50_000,
    class_sampling=None,
    uint8="trunc",
    reference="ImageNet's 50,000 validation pictures, centre crops: the originals",
)
