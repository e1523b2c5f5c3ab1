"""Train an EAGLE drafter for a finished next-token generator: one layer that continues its hidden states.

accelerate launch scripts/train_drafter.py --config configs/drafters/digits_eagle.yaml
accelerate launch scripts/train_drafter.py --config ... --target_run runs/my-run --out runs/my-drafter
accelerate launch scripts/train_drafter.py --config ... --resume                               # continue
"""

from training.jobs import drafter_job
from training.options import command_line, drafter_parser, parse


def main() -> None:
    config = parse(drafter_parser())
    trained = drafter_job(config)
    print(f"{config['out']}: {'trained' if trained else 'was finished before, nothing to do'}")


if __name__ == "__main__":
    command_line(main)
