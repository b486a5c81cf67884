"""The page of `mue-hf app` as a Hugging Face Space; README.md beside this file says how to set one up."""

import os
from pathlib import Path

import torch

from mue_hf import MuEForConditionalGeneration, MuEProcessor
from mue_hf.app.page import build_page, find_photos, serve

MODEL = os.environ.get("MODEL", "ORG/NAME")
PHOTOS = Path(__file__).parent / "photos"


def main() -> None:
    """Loads the model and serves the page, at the address that the Space's environment names."""
    model = MuEForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    photos = find_photos(PHOTOS) if PHOTOS.is_dir() else []
    serve(build_page(model, MuEProcessor.from_pretrained(MODEL), photos))


if __name__ == "__main__":
    main()
