"""Make data/assets/emoji32.webp and emoji32.json from the unpacked npm package emoji-datasource-google 16.0.0.

Run once, when the sheet was made (`npm pack emoji-datasource-google@16.0.0`, unpack, run); the results are kept in the
repository. Source cells are 64 px RGBA with transparent black corners, so they are put on white before they shrink.
"""

import hashlib
import json
from pathlib import Path

from jsonargparse import auto_cli
from PIL import Image

SOURCE_CELL, BORDER = 64, 1  # pixels; a cell of the source sheet has a transparent border on every side
CELL, COLUMNS = 32, 44


def make_emoji_sheet(package: Path, out: Path = Path("data/assets")) -> None:
    """Write the sheet of every base emoji but the components (bare hair and skin), sorted by code points.

    Args:
        package: the unpacked npm package, holding emoji.json and img/google/sheets/64.png
        out: the folder to write to
    """
    entries = [entry for entry in json.loads((package / "emoji.json").read_text()) if entry["has_img_google"]]
    entries = sorted((e for e in entries if e["category"] != "Component"), key=lambda entry: entry["unified"])
    source = Image.open(package / "img/google/sheets/64.png").convert("RGBA")
    rows = -(-len(entries) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL, rows * CELL), "white")
    pitch = SOURCE_CELL + 2 * BORDER
    for place, entry in enumerate(entries):
        left, top = entry["sheet_x"] * pitch + BORDER, entry["sheet_y"] * pitch + BORDER
        cell = source.crop((left, top, left + SOURCE_CELL, top + SOURCE_CELL))
        white = Image.new("RGBA", cell.size, "white")
        picture = Image.alpha_composite(white, cell).convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC)
        sheet.paste(picture, (place % COLUMNS * CELL, place // COLUMNS * CELL))
    path = out / "emoji32.webp"
    sheet.save(path, lossless=True, quality=100, method=6, exact=True)
    emoji = [[entry[key] for key in ("unified", "name", "category", "subcategory")] for entry in entries]
    header = {"source": "npm emoji-datasource-google 16.0.0", "cell": CELL, "columns": COLUMNS}
    head = json.dumps(header | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}, indent=1)
    lines = ",\n".join(json.dumps(row) for row in emoji)
    (out / "emoji32.json").write_text(f'{head[:-2]},\n "emoji": [\n{lines}\n]}}\n')
    print(f"{len(emoji)} pictures, {path.stat().st_size:,} bytes: {path}")


if __name__ == "__main__":
    auto_cli(make_emoji_sheet)
