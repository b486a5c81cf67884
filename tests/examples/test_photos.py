"""The photos of the demo: each is small, and its source and the words that name it are written down."""

import re
from pathlib import Path

from PIL import Image

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"


def test_each_photo_is_listed_and_small():
    names = sorted(path.name for path in PHOTOS.glob("*.jpg"))
    rows = re.findall(r"^\| (\S+\.jpg) \|.*[^| ] \|$", (PHOTOS / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(names) == 8
    # Once in the table of sources and once in that of words.
    assert sorted(rows) == sorted(names * 2)
    notice = (PHOTOS.parents[1] / "NOTICE").read_text(encoding="utf-8")
    for name in names:
        assert name in notice
        assert (PHOTOS / name).stat().st_size <= 60_000
        with Image.open(PHOTOS / name) as photo:
            assert max(photo.size) <= 480
