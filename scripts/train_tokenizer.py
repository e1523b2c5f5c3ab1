"""Train a tokenizer.

accelerate launch scripts/train_tokenizer.py --config configs/tokenizers/digits_vq.yaml
accelerate launch scripts/train_tokenizer.py --config ... --train.lr 3e-4 --out runs/other     # any key of the file
accelerate launch scripts/train_tokenizer.py --config ... --resume                             # continue
"""

from training.jobs import tokenizer_job
from training.options import command_line, parse, tokenizer_parser


def main() -> None:
    config = parse(tokenizer_parser())
    trained = tokenizer_job(config)
    print(f"{config['out']}: {'trained' if trained else 'was finished before, nothing to do'}")


if __name__ == "__main__":
    command_line(main)
