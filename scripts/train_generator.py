"""Train a generator on the tokens of a finished tokenizer run.

accelerate launch scripts/train_generator.py --config configs/generators/digits.yaml --out runs/digits
accelerate launch scripts/train_generator.py --config ... --out ... --resume      # continue; --key.sub value overrides
"""

from training.jobs import generator_job
from training.options import command_line, generator_parser, parse


def main() -> None:
    config = parse(generator_parser())
    trained = generator_job(config)
    print(f"{config['out']}: {'trained' if trained else 'was finished before, nothing to do'}")


if __name__ == "__main__":
    command_line(main)
