"""Turn a data set into a token cache: every picture encoded once, so that generators train without their tokenizer.

python scripts/cache_tokens.py --tokenizer-run runs/vq --data folder --root /data/birds --out caches/birds
accelerate launch scripts/cache_tokens.py ...     # many processes; interrupted, the same command goes on
"""

import re
import sys

from jsonargparse import auto_cli

from training.caching import cache_tokens
from training.options import command_line


def main() -> None:
    words = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in sys.argv[1:]]
    auto_cli(cache_tokens, as_positional=False, args=words)  # --batch-size as --batch_size


if __name__ == "__main__":
    command_line(main)
