"""Draws docs/photos.png, the demo photos with what the small checkpoint says of them, from `mue-hf caption --json`:

mue-hf caption examples/photos/*.jpg --json | python docs/photos.py docs/photos.png
"""

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mue_hf.app.report import INK, MARGIN, QUIET, wrap
from mue_hf.files import whole_file

COLUMNS, SIDE, TEXT = 4, 240, 128


def contact_sheet(records: list[dict[str, Any]]) -> Image.Image:
    """The photos in rows of four, below each its caption at full depth and, where it differs, the one with exits.

    Args:
        records (list of `dict`): what `mue-hf caption --json` prints, one for each photo.
    """
    normal, small = ImageFont.load_default(17), ImageFont.load_default(13)
    rows = -(-len(records) // COLUMNS)
    size = (MARGIN + COLUMNS * (SIDE + MARGIN), MARGIN + rows * (SIDE * 2 // 3 + TEXT + MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, record in enumerate(records):
        left = MARGIN + number % COLUMNS * (SIDE + MARGIN)
        top = MARGIN + number // COLUMNS * (SIDE * 2 // 3 + TEXT + MARGIN)
        with Image.open(record["image"]) as image:
            photo = image.convert("RGB")
        photo.thumbnail((SIDE, SIDE * 2 // 3))
        sheet.paste(photo, (left, top))
        line = top + SIDE * 2 // 3 + 8
        texts = [(record["full_depth_caption"], normal, 21, INK)]
        if record["caption"] != record["full_depth_caption"]:
            texts.append((f"with exits: {record['caption']}", small, 16, QUIET))
        for text, font, height, colour in texts:
            for part in wrap(text, font, SIDE):
                draw.text((left, line), part, fill=colour, font=font)
                line += height
            line += 5
    return sheet


def main() -> None:
    """Reads the records from standard input."""
    records = [json.loads(line) for line in sys.stdin if line.strip()]
    if not records or len(sys.argv) != 2:
        raise SystemExit(__doc__)
    with whole_file(Path(sys.argv[1])) as part:
        contact_sheet(records).save(part, "PNG")


if __name__ == "__main__":
    main()
