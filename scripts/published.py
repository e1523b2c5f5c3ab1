"""Published checkpoints: list them, show one, or say which of them a file holds.

python scripts/published.py list
python scripts/published.py show llamagen-b-256
python scripts/published.py check c2i_B_256.pt --name llamagen-b-256
"""

import sys
from dataclasses import asdict
from pathlib import Path

import yaml
from jsonargparse import auto_cli

from training.published import Entry, PublishedError, check, entries, find

SHOWN = 20  # faults printed of a file that fits nothing


def list_entries() -> None:
    """Print a table of all published checkpoints."""
    rows = [("name", "parameters", "pixels", "tokenizer", "guidance", "published", "file")]
    rows += [_row(entry) for entry in entries().values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show(name: str) -> None:
    """Print all that is known of a checkpoint.

    Args:
        name: as the table of `list` has it
    """
    entry = find(name)
    facts = asdict(entry) | {"parameters": f"{entry.parameters} M", "url": entry.url, "cached_under": str(entry.cache)}
    facts["sha256"] = entry.sha256 or "not known; that of the file found is recorded"
    if entry.tokenizer:
        facts["tokenizer_url"] = find(entry.tokenizer).url
    print(yaml.safe_dump({key: value for key, value in facts.items() if value}, sort_keys=False, width=120), end="")


def check_file(file: Path, name: str | None = None) -> None:
    """Say which published checkpoint a file holds, or why it holds none.

    Args:
        file: a torch or safetensors file
        name: hold it against this checkpoint alone
    """
    report = check(file, name)
    if not report.fits:
        listed = "\n  ".join(report.faults[:SHOWN])
        rest = f"\n  and {len(report.faults) - SHOWN} more" if len(report.faults) > SHOWN else ""
        raise PublishedError(
            f"{file}: fits no published checkpoint{'' if name is None else ' of that name'}; "
            f"{len(report.faults)} keys differ from {report.closest}:\n  {listed}{rest}"
        )
    same = " (they store the same: the checksum or the file's name must tell)" if len(report.fits) > 1 else ""
    ignored = "; ".join(f"{key} ({reason})" for key, reason in report.ignored.items())
    facts = {
        "fits": ", ".join(report.fits) + same,
        "sha256": report.sha256,
        "tensors": f"{report.tensors}, none left over",
        "ignored": ignored or "none",
        "parameters": f"{report.parameters:,}",
        "loaded in": f"{report.seconds:.2f} s",
    }
    print(file)
    for key, value in facts.items():
        print(f"  {key:<10}  {value}")


def _row(entry: Entry) -> tuple[str, ...]:
    size = (entry.tokenizer_config or entry.config).get("image_size", "")
    size = size or next((number["protocol"]["made_at"] for number in entry.reported), "")
    numbers = [f"{number['metric']} {number['value']:.2f}" for number in entry.reported[:1]]
    guidance = entry.recipe.get("guidance", {})
    scale = guidance.get("end", guidance.get("scale", ""))  # of a rising schedule its last
    return (
        entry.name,
        f"{entry.parameters:.1f} M",
        str(size),
        entry.tokenizer or "",
        str(scale),
        *(numbers or [""]),
        f"{entry.hub}/{entry.file}",
    )


if __name__ == "__main__":
    commands = {"list": list_entries, "show": show, "check": check_file}
    try:
        auto_cli(commands, description=__doc__.split("\n\n")[0])
    except (ValueError, OSError) as error:  # UnknownName, CheckpointError and CheckpointMismatch are ValueErrors
        sys.exit(f"error: {error}")
