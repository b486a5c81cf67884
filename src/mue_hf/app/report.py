"""Draws one caption and the depth of its parts into a PNG."""

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

WIDTH, MARGIN, PHOTO, COLUMN, GAP = 1040, 24, 360, 62, 2
INK, QUIET, RAN, SKIPPED = "#1d2733", "#66717d", "#1f7a8c", "#e4e8eb"


def wrap(text: str, font: Font, width: float) -> list[str]:
    """Breaks `text` at spaces into lines of at most `width` pixels; a word that is longer has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or ["(nothing)"]


def shorten(text: str, font: Font, width: float) -> str:
    """`text` cut to `width` pixels, with two dots where something is missing."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}..") > width:
        text = text[:-1]
    return f"{text}.."


def draw_report(image: Image.Image, record: dict[str, Any]) -> Image.Image:
    """The picture of one caption: photo, both captions, what was skipped, and a bar of layers for each stream and
    token, filled where they ran.

    Args:
        image (`PIL.Image.Image`): the photo, in RGB.
        record (`dict`): what `mue-hf caption --json` prints for it.
    """
    large, normal, small = (ImageFont.load_default(size) for size in (24, 16, 13))
    photo = image.copy()
    photo.thumbnail((PHOTO, PHOTO))
    left = 2 * MARGIN + PHOTO
    captions = [
        ("with exits", large, 31, wrap(record["caption"], large, WIDTH - left - MARGIN)),
        ("at full depth", normal, 20, wrap(record["full_depth_caption"], normal, WIDTH - left - MARGIN)),
    ]
    beside = 102 + sum(30 + height * len(lines) for _, _, height, lines in captions)
    depth, per_row = record["decoder_layers"], (WIDTH - 2 * MARGIN) // COLUMN
    cell = min(14, max(3, 110 // depth))
    row_height = depth * (cell + GAP) + 56
    bars_top = MARGIN + max(photo.height, beside) + 44
    rows = -(-len(record["tokens"]) // per_row)
    canvas = Image.new("RGB", (WIDTH, bars_top + rows * row_height + MARGIN), "white")
    canvas.paste(photo, (MARGIN, MARGIN))
    draw = ImageDraw.Draw(canvas)

    top = MARGIN
    for label, font, height, lines in captions:
        draw.text((left, top), label, QUIET, small)
        for number, line in enumerate(lines):
            draw.text((left, top + 18 + number * height), line, INK, font)
        top += 30 + height * len(lines)
    for name in ("image", "text"):
        ran, layers = record[f"{name}_exit_layers"], record[f"{name}_layers"]
        draw.text((left, top), f"{name} stream", QUIET, small)
        _draw_layers(draw, [(left + 100 + layer * (cell + GAP), top) for layer in range(layers)], (cell, 14), ran)
        draw.text((left + 112 + layers * (cell + GAP), top), f"{ran} of {layers} layers", INK, small)
        top += 24
    skipped = f"skipped: {record['layers_skipped']:.0%} of layers, {record['flops_skipped']:.0%} of FLOPs"
    seconds = (1000 * record["seconds"], 1000 * record["full_depth_seconds"])
    draw.text((left, top + 6), skipped, INK, normal)
    draw.text((left, top + 30), "time: {:.0f} ms with exits, {:.0f} ms at full depth".format(*seconds), INK, normal)

    draw.text((MARGIN, bars_top - 26), f"decoder layers run for each token, of {depth}", QUIET, small)
    for index, token in enumerate(record["tokens"]):
        x = MARGIN + index % per_row * COLUMN
        base = bars_top + index // per_row * row_height + depth * (cell + GAP)
        corners = [(x, base - (layer + 1) * (cell + GAP)) for layer in range(depth)]
        _draw_layers(draw, corners, (COLUMN - 9, cell), token["layers"])
        center = x + (COLUMN - 10) / 2
        text = shorten(token["text"].strip() or repr(token["text"]), small, COLUMN - 4)
        draw.text((center, base + 4), str(token["layers"]), QUIET, small, anchor="ma")
        draw.text((center, base + 20), text, INK, small, anchor="ma")
    return canvas


def _draw_layers(
    draw: ImageDraw.ImageDraw, corners: Sequence[tuple[int, int]], size: tuple[int, int], ran: int
) -> None:
    """A box of `size` pixels at each corner, the first `ran` of them filled."""
    for layer, (x, y) in enumerate(corners):
        draw.rectangle((x, y, x + size[0] - 1, y + size[1] - 1), RAN if layer < ran else SKIPPED)


__all__ = ["draw_report"]
