"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a name beside `path` to write to, and makes that file `path` when the block ends well: whoever reads
    `path` finds the old content or all of the new. Makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        # the name must not reach the disk before the content
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes text (UTF-8) or bytes to a file, whole or not at all; makes its folder."""
    with whole_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


__all__ = ["whole_file", "write_whole"]
