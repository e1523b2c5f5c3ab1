"""Train a generator on the tokens of a finished tokenizer run.

accelerate launch scripts/train_generator.py --config configs/generators/digits_next_token.yaml
accelerate launch scripts/train_generator.py --config ... --train.lr 3e-4 --out runs/other     # any key of the file
accelerate launch scripts/train_generator.py --config ... --resume                             # continue
"""

from training.jobs import generator_job
from training.options import command_line, generator_parser, parse


def main() -> None:
    config = parse(generator_parser())
    trained = generator_job(config)
    print(f"{config['out']}: {'trained' if trained else 'was finished before, nothing to do'}")


if __name__ == "__main__":
    command_line(main)
