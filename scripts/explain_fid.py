"""Say why two results of scripts/evaluate.py differ: which parts of the protocol do, and how far each moves the number.

python scripts/explain_fid.py ours.json theirs.json
python scripts/explain_fid.py ours.json ours.json --score adm/fid@50000 --against clean-fid/fid@50000
"""

import sys
from pathlib import Path

from jsonargparse import auto_cli

from eval.explain import ExplainError, explain, read_result


def explain_fid(first: Path, second: Path, score: str | None = None, against: str | None = None) -> None:
    """Compare every score that both files have, or one of each.

    Args:
        first: JSON of scripts/evaluate.py
        second: another, or the same
        score: name of one score in the first
        against: name of one in the second; the same name by default
    """
    ours, theirs = read_result(first), read_result(second)
    for comparison in explain(ours, theirs, score, against):
        print("\n".join(comparison.lines()), end="\n\n")


if __name__ == "__main__":
    try:
        auto_cli(explain_fid)
    except ExplainError as error:
        sys.exit(f"error: {error}")
