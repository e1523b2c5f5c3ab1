"""Turn a data set into a token cache: every picture encoded once, so that generators train without their tokenizer.

Discrete tokens are kept as codes, continuous ones as the mean and log-variance of their posterior.

python scripts/cache_tokens.py --tokenizer-run runs/vq --data folder --root /data/birds --out caches/birds
accelerate launch scripts/cache_tokens.py ...     # many processes; interrupted, the same command goes on
"""

from jsonargparse import auto_cli

from training.caching import cache_tokens
from training.options import command_line, underscored


def main() -> None:
    auto_cli(cache_tokens, as_positional=False, args=underscored())


if __name__ == "__main__":
    command_line(main)
