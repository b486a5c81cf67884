"""`mue-hf app`: a page that captions a photo, or judges a statement about it, and shows where and why layers stop."""

import argparse

from ..app.page import PHOTOS, build_page, find_photos, require_extra, serve
from .options import add_model_arguments, at_least, load_model

EXAMPLE = """example:
  mue-hf app
  mue-hf app --model path/to/checkpoint --photos path/to/photos --port 8000

Serves a page at http://127.0.0.1:7860 until it is interrupted; --host 0.0.0.0 lets other machines in, --share asks
Gradio for a public address. One photo is worked on at a time, so that times are those of the model alone.
Needs the extra app: pip install 'mue-hf[app]'"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `mue-hf app` takes."""
    parser.epilog = EXAMPLE
    add_model_arguments(parser)
    parser.add_argument("--photos", metavar="DIR", help=f"photos to pick from; default: {PHOTOS}, where it exists")
    parser.add_argument("--repeats", type=at_least(1), default=3, metavar="N", help="timed runs each (default: 3)")
    parser.add_argument("--host", help="address to listen at (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=at_least(1), metavar="N", help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also at a public address, through Gradio's servers")


def run(args: argparse.Namespace) -> int:
    """Serves the page until it is interrupted."""
    require_extra()
    photos = find_photos(args.photos)
    page = build_page(*load_model(args), photos, args.repeats)
    serve(page, server_name=args.host, server_port=args.port, share=args.share)
    return 0


__all__ = ["add_arguments", "run"]
