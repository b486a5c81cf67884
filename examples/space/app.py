"""The page of `mue-hf app` as a Hugging Face Space; README.md beside this file says how to set one up."""

import os
from pathlib import Path

from mue_hf.app import build_page, find_photos, serve
from mue_hf.inference.loading import load_checkpoint

MODEL = os.environ.get("MODEL", "ORG/NAME")
PHOTOS = Path(__file__).parent / "photos"


def main() -> None:
    """Loads the model and serves the page, at the address that the Space's environment names."""
    photos = find_photos(PHOTOS) if PHOTOS.is_dir() else []
    serve(build_page(*load_checkpoint(MODEL), photos))


if __name__ == "__main__":
    main()
