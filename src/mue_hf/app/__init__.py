"""What a person looks at: the page of `mue-hf app`, and the picture of a caption and its depths."""

from .page import build_page, find_photos, serve

__all__ = ["build_page", "find_photos", "serve"]
