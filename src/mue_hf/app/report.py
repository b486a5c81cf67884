"""Draws one caption and the depth of its parts into a PNG."""

from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..files import write_whole

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

WIDTH, MARGIN, PHOTO, COLUMN = 1040, 24, 360, 62
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
    """The picture of one caption.

    Args:
        image (`PIL.Image.Image`): the photo, in RGB.
        record (`dict`): what `mue-hf caption --json` prints for it.

    Returns:
        `PIL.Image.Image`: photo, both captions, what was skipped, and a bar of layers for the image stream, the text
        stream and each token. Layers that ran are filled.
    """
    large, normal, small = (ImageFont.load_default(size) for size in (24, 16, 13))
    photo = image.copy()
    photo.thumbnail((PHOTO, PHOTO))
    per_row = (WIDTH - 2 * MARGIN) // COLUMN
    tokens, depth = record["tokens"], record["decoder_layers"]
    cell = min(14, max(3, 110 // depth))
    row_height = depth * (cell + 2) + 56
    left = MARGIN + PHOTO + MARGIN
    captions = [
        ("with exits", large, 31, wrap(record["caption"], large, WIDTH - left - MARGIN)),
        ("at full depth", normal, 20, wrap(record["full_depth_caption"], normal, WIDTH - left - MARGIN)),
    ]
    beside = 102 + sum(30 + height * len(lines) for _, _, height, lines in captions)
    bars_top = MARGIN + max(photo.height, beside) + 44
    canvas = Image.new("RGB", (WIDTH, bars_top + -(-len(tokens) // per_row) * row_height + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    canvas.paste(photo, (MARGIN, MARGIN))

    top = MARGIN
    for label, font, height, lines in captions:
        draw.text((left, top), label, QUIET, small)
        top += 18
        for line in lines:
            draw.text((left, top), line, INK, font)
            top += height
        top += 12
    for name in ("image", "text"):
        ran, layers = record[f"{name}_exit_layers"], record["encoder_layers"]
        draw.text((left, top), f"{name} stream", QUIET, small)
        for layer in range(layers):
            x = left + 100 + layer * (cell + 2)
            draw.rectangle((x, top, x + cell - 1, top + 13), RAN if layer < ran else SKIPPED)
        draw.text((left + 112 + layers * (cell + 2), top), f"{ran} of {layers} layers", INK, small)
        top += 24
    top += 6
    for line in (
        f"skipped: {record['layers_skipped']:.0%} of layers, {record['flops_skipped']:.0%} of FLOPs",
        f"time: {1000 * record['seconds']:.0f} ms with exits, "
        f"{1000 * record['full_depth_seconds']:.0f} ms at full depth",
    ):
        draw.text((left, top), line, INK, normal)
        top += 24

    draw.text((MARGIN, bars_top - 26), f"decoder layers run for each token, of {depth}", QUIET, small)
    for index, token in enumerate(tokens):
        x = MARGIN + index % per_row * COLUMN
        base = bars_top + index // per_row * row_height + depth * (cell + 2)
        for layer in range(depth):
            y = base - (layer + 1) * (cell + 2)
            draw.rectangle((x, y, x + COLUMN - 10, y + cell - 1), RAN if layer < token["layers"] else SKIPPED)
        center = x + (COLUMN - 10) / 2
        text = shorten(token["text"].strip() or repr(token["text"]), small, COLUMN - 4)
        draw.text((center, base + 4), str(token["layers"]), QUIET, small, anchor="ma")
        draw.text((center, base + 20), text, INK, small, anchor="ma")
    return canvas


def save_png(picture: Image.Image, path: Path) -> None:
    """Writes `path` whole or not at all; makes its folder."""
    content = BytesIO()
    picture.save(content, format="PNG")
    write_whole(path, content.getvalue())


__all__ = ["draw_report", "save_png"]
