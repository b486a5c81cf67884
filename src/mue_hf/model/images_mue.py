"""Reads one image from wherever it is, a path, an address, base64 or an array, as upright 8-bit RGB."""

import base64
import os
import time
from io import BytesIO
from threading import Timer
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

REMEDY = "pass a PIL image, a path, an http(s) URL, base64, or an array of 1, 3 or 4 channels"

#: Pixels that an image file may have: a small file can claim far more than fit in memory.
MAX_PIXELS = 2**27
#: Bytes that a download, or an image in base64, may have.
MAX_DOWNLOAD_BYTES = 64 * 2**20
#: Seconds that a download may take, from the first byte sent to the last one received.
DOWNLOAD_SECONDS = 20.0
# Characters of an address or a path that a message repeats.
SHOWN = 200


def _array_to_pil(array: np.ndarray, name: str) -> Image.Image:
    """An array of one image, as a PIL image of 8 bits per channel: mode L, RGB or RGBA."""
    if array.dtype.kind not in "buif":
        raise ValueError(f"{name} must hold numbers, got an array of {array.dtype}; {REMEDY}.")
    if 0 in array.shape:
        raise ValueError(f"{name} must not be empty, got an array of shape {array.shape}; {REMEDY}.")
    if array.ndim not in (2, 3):
        raise ValueError(f"{name} must have 2 or 3 dimensions, got shape {array.shape}; {REMEDY}.")
    if array.ndim == 3:
        try:
            layout = infer_channel_dimension_format(array, num_channels=(1, 3, 4))
        except ValueError as error:
            raise ValueError(f"{name} must have 1, 3 or 4 channels, got shape {array.shape}; {REMEDY}.") from error
        if layout == ChannelDimension.FIRST:
            array = np.moveaxis(array, 0, -1)
        if array.shape[-1] == 1:
            array = array[..., 0]
    if array.dtype == np.bool_:
        array = array * 255
    elif array.dtype == np.uint16:
        # Rounds to the nearest of 256 levels: 65535 / 255 is exactly 257.
        array = (array.astype(np.uint32) + 128) // 257
    elif array.dtype.kind == "f":
        # A comparison with NaN is false, so NaN is refused too.
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"{name} must hold floats in [0, 1], got values in [{array.min()}, {array.max()}]; "
                f"divide by the largest level, or pass integers in 0..255."
            )
        array = np.rint(array * 255)
    elif array.min() < 0 or array.max() > 255:
        raise ValueError(
            f"{name} must hold levels in 0..255, got {array.dtype} values in [{array.min()}, {array.max()}]; "
            f"pass uint16 for 16-bit levels."
        )
    return Image.fromarray(np.ascontiguousarray(array, np.uint8))


def to_rgb(image: Image.Image, name: str = "`image`") -> Image.Image:
    """
    Any PIL image as upright 8-bit RGB: of an animation the current frame.

    The camera's EXIF orientation is applied. 16-bit greys (modes I;16 and I) are scaled to 8 bits, not clipped.
    Transparent pixels are shown on white, as viewers do; OFA dropped the transparency, which reveals whatever colour
    lies below.

    Args:
        image (`PIL.Image.Image`): of any mode, not changed.
        name (`str`, *optional*, defaults to `` "`image`" ``): what error messages call it.

    Raises:
        ValueError: if the image has no pixels, cannot be decoded, or has a mode without a meaning as colour.
    """
    if 0 in image.size:
        raise ValueError(f"{name} must have pixels, got size {image.size[0]}x{image.size[1]}; pass another image.")
    try:
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("F", "I")):
            levels = np.asarray(image)
            # Files open with integers when they hold 16-bit levels; deeper ones have no known range.
            if image.mode != "F" and levels.min() >= 0 and levels.max() <= 65535:
                levels = levels.astype(np.uint16)
            image = _array_to_pil(levels, name)
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    # Pillow's decoders raise a dozen kinds of errors on damaged files.
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        raise ValueError(
            f"{name} must be a complete image that Pillow can decode, got an error: {error}; "
            f"save it again as PNG or JPEG."
        ) from error


def _read_url(url: str, name: str, timeout: float) -> bytes:
    if not timeout > 0:
        raise ValueError(
            f"`timeout` must be a number of seconds above 0, got {timeout}; leave it out for the default."
        )
    received, deadline = bytearray(), time.monotonic() + timeout
    # What comes packed may unpack to any size.
    headers = {"Accept-Encoding": "identity"}
    client = httpx.Client(timeout=timeout, follow_redirects=True, max_redirects=5, headers=headers)
    # The client's own timeout starts anew with every byte; without a connection the transfer ends.
    timer = Timer(timeout, client.close)
    timer.daemon = True
    timer.start()
    try:
        with client, client.stream("GET", url) as response:
            response.raise_for_status()
            for part in response.iter_raw():
                received += part
                if len(received) > MAX_DOWNLOAD_BYTES:
                    break
    # What a closed connection raises depends on where it was closed.
    except Exception as error:
        if time.monotonic() >= deadline:
            raise ValueError(
                f"{name} must be downloaded within {timeout:g} seconds, got {len(received)} bytes by then; "
                "pass a greater `timeout`, or download it and pass the file."
            ) from error
        raise ValueError(
            f"{name} must be a URL that answers, got an error: {error}; check it, or pass a file."
        ) from error
    finally:
        timer.cancel()
    if len(received) > MAX_DOWNLOAD_BYTES:
        raise ValueError(
            f"{name} must have at most {MAX_DOWNLOAD_BYTES >> 20} MB to be downloaded, got more; shrink it, or "
            "download it and pass the file."
        )
    return bytes(received)


def _read_base64(source: str, name: str) -> Image.Image | None:
    """The image of a data URI or of plain base64; None for another text, such as a mistyped path."""
    uri = source.startswith("data:")
    payload = source.partition(",")[2] if uri else source
    if 3 * len(payload) // 4 > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{name} must have at most {MAX_DOWNLOAD_BYTES >> 20} MB as base64, got more; shrink it.")
    try:
        content = base64.b64decode("".join(payload.split()), validate=True)
    except ValueError:
        content = b""
    if uri and not content:
        raise ValueError(f"{name} must hold the image in base64, as in data:image/png;base64,..., got something else.")
    try:
        return _open(BytesIO(content), f"{name} (base64)")
    except ValueError as error:
        # Many a mistyped path is valid base64.
        if not uri and isinstance(error.__cause__, UnidentifiedImageError):
            return None
        raise


def load_image(image: Any, name: str = "image", timeout: float | None = None) -> Image.Image:
    """
    One image from wherever it is, as upright 8-bit RGB (see `to_rgb`).

    Args:
        image (`str`, `os.PathLike`, `bytes`, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): a path, an http(s)
            URL, a data URI or plain base64 of an image file, its bytes, an image, or an array [height, width],
            [height, width, channels] or [channels, height, width] of levels: uint8, uint16, bool, or floats in [0, 1].
        name (`str`, *optional*, defaults to `"image"`): what error messages call it, such as "images[3]".
        timeout (`float`, *optional*): seconds for a URL, `DOWNLOAD_SECONDS` without it. A server that stalls is given
            at most twice as long.

    Raises:
        ValueError: if it cannot be found, fetched, decoded, or has no pixels; if a file has more than `MAX_PIXELS`
            pixels, or a download or base64 more than `MAX_DOWNLOAD_BYTES` bytes.
    """
    name = f"`{name}`"
    if isinstance(image, torch.Tensor):
        try:
            image = (image.float() if image.dtype == torch.bfloat16 else image).numpy(force=True)
        # Sparse, quantised and meta tensors, and dtypes that NumPy lacks.
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{name} must be a tensor that NumPy can hold, got an error: {error}; {REMEDY}."
            ) from error
    if isinstance(image, np.ndarray):
        return to_rgb(_array_to_pil(image, name), name)
    if isinstance(image, Image.Image):
        return to_rgb(image, name)
    if isinstance(image, bytes):
        return _open(BytesIO(image), name)
    if not isinstance(image, str | os.PathLike):
        raise ValueError(f"{name} must be an image, got {type(image).__name__}; {REMEDY}.")
    source = os.fsdecode(image)
    named = f"{name} ({source if len(source) <= SHOWN else source[:SHOWN] + '...'})"
    if source.startswith(("http://", "https://")):
        return _open(BytesIO(_read_url(source, named, DOWNLOAD_SECONDS if timeout is None else timeout)), named)
    if os.path.isfile(source):
        return _open(source, named)
    # Reading a pipe or a device might never end.
    if os.path.exists(source):
        raise ValueError(f"{named} must be a file, got a folder, a pipe or a device; {REMEDY}.")
    if (embedded := _read_base64(source, name)) is not None:
        return embedded
    # Perhaps base64 with a mistake in it.
    if len(source) > SHOWN:
        named = f"{name} (a text of {len(source):,} characters)"
    raise ValueError(f"{named} must exist, got no such file; check the path.")


def _open(file: Any, name: str) -> Image.Image:
    try:
        opened = Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} must have at most {MAX_PIXELS:,} pixels: {error}; shrink it.") from error
    except Exception as error:
        # Pillow's own message holds the address of the object that it read from.
        reason = "it has no known format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(
            f"{name} must be an image that Pillow can read, got an error: {reason}; save it again as PNG or JPEG."
        ) from error
    with opened:
        # Before anything is decoded: what would take all memory, and PostScript, a program that Pillow would hand to
        # Ghostscript.
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(
                f"{name} must have at most {MAX_PIXELS:,} pixels, got {opened.width} x {opened.height}; shrink it."
            )
        if opened.format == "EPS":
            raise ValueError(f"{name} must hold pixels, got PostScript; save it as PNG or JPEG.")
        return to_rgb(opened, name)


__all__ = ["DOWNLOAD_SECONDS", "MAX_DOWNLOAD_BYTES", "MAX_PIXELS", "load_image", "to_rgb"]
