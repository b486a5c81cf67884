"""The file of a long run: rows are added as they are done, a killed run goes on, and the result appears whole."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import whole_file, write_whole
from .sources import Row, batches, parquet_library, printable

FORMATS = (".jsonl", ".parquet")
# Rows of a parquet file that are in memory at a time.
CHUNK = 1000


class Journal:
    """
    Rows on their way into `out`, in order, each once, whatever ends the process.

    Beside `out` lie, while the work lasts, `out`.part (a JSON line for each row that is done) and `out`.lock; and, for
    good, `out`.run.json: the settings, and at the end the counts.

    Args:
        out (`str` or `os.PathLike`): a .jsonl or .parquet file.
        settings (`dict`): all that the rows depend on; a run goes on only under the same ones.
        types (`dict`): column -> "int", "float", "str", "ints" or "floats"; for others their values decide.
        overwrite (`bool`, *optional*, defaults to `False`): whether a result, or a beginning of one, is thrown away.

    Raises:
        ValueError: if `out` has another format, its folder does not exist, another process is writing it, it is there
            already and was not made by such a run, or was made, or begun, with other settings.
    """

    def __init__(
        self, out: str | os.PathLike, settings: Mapping[str, Any], types: Mapping[str, str], overwrite: bool = False
    ) -> None:
        self.out, self.types, self.overwrite = Path(out), types, overwrite
        if self.out.suffix not in FORMATS:
            raise ValueError(f"`out` must end in {' or '.join(FORMATS)}, got {str(out)!r}; rename it.")
        if not self.out.parent.is_dir():
            raise ValueError(f"`out` must be in a folder that exists, got {str(out)!r}; make the folder.")
        if self.out.suffix == ".parquet":
            # Not after hours of work.
            parquet_library()
        # As it reads when it comes back from the file.
        self.settings = json.loads(json.dumps(settings, default=str))
        self.part, self.run, lock = (
            self.out.with_name(f"{self.out.name}.{suffix}") for suffix in ("part", "run.json", "lock")
        )
        self.lock = FileLock(lock)
        self.counts = {"rows": 0, "bad": 0}
        self.complete = False
        #: What `out`.run.json holds once the work is complete.
        self.finished: dict[str, Any] = {}
        self._file: Any = None

    def __enter__(self) -> "Journal":
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"`out` must not be in use, but another process is writing {self.out}; wait for it, or name another."
            ) from error
        try:
            self._open()
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()
        if self.complete:
            # Open files cannot be removed everywhere.
            with suppress(OSError):
                os.unlink(self.lock.lock_file)
        self.lock.release()

    def _open(self) -> None:
        if self.overwrite:
            for path in (self.out, self.part, self.run):
                path.unlink(missing_ok=True)
        run = self._read_run()
        for path, named in ((self.out, "counts"), (self.part, "settings")):
            if named not in run and path.exists():
                raise ValueError(
                    f"`out` must be new, or made by such a run, but {path} exists and {self.run.name} has no {named}; "
                    "name another file, or pass --overwrite (`overwrite=True`)."
                )
        old, new = run.get("settings", self.settings), self.settings
        if names := [name for name in old | new if old.get(name) != new.get(name)]:
            changes = "; ".join(f"{name} {old.get(name)!r} there, {new.get(name)!r} now" for name in names)
            raise ValueError(
                f"`out` must be of a run with the same settings, but {self.out} was begun with others: {changes}; "
                "name another file, or pass --overwrite (`overwrite=True`)."
            )
        if self.out.exists():
            self.complete, self.counts, self.finished = True, run["counts"], run
            # left behind by a kill
            self.part.unlink(missing_ok=True)
            return
        write_whole(self.run, json.dumps({"settings": self.settings}, indent=2))
        self._file = open(self.part, "a+b")

    def _read_run(self) -> dict[str, Any]:
        if not self.run.exists():
            return {}
        try:
            run = json.loads(self.run.read_bytes())
            run["settings"].keys()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.run} must hold the settings of a run as JSON, got an error: {error!r}; delete it and "
                f"{self.part}."
            ) from error
        return run

    def remaining(self, rows: Iterable[Row], seen: Callable[[dict[str, Any]], None] | None = None) -> Iterator[Row]:
        """The rows that are not done yet; cuts off what a kill has torn. `seen` is given the results that are done.

        Raises:
            ValueError: if what is done is of another source.
        """
        rows = iter(rows)
        self._file.seek(0)
        end = 0
        for line in self._file:
            record = _record(line)
            if record is None or record.get("row") != self.counts["rows"]:
                break
            row = next(rows, None)
            if row is None or (row.number, row.name) != (record["row"], record["image"]):
                raise ValueError(
                    f"`source` must begin with the rows that are done, but row {record['row']} of {self.part} is "
                    f"{record['image']!r} and here {None if row is None else row.name!r}: the source has changed; "
                    "restore it, name another file, or pass --overwrite (`overwrite=True`)."
                )
            end += len(line)
            self._count(record)
            if seen is not None:
                seen(record)
        self._file.truncate(end)
        self._file.seek(end)
        return rows

    def _count(self, record: Mapping[str, Any]) -> None:
        self.counts["rows"] += 1
        self.counts["bad"] += record["error"] is not None

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows; when it returns they outlive a loss of power."""
        for record in records:
            # JSON knows neither NaN nor infinity.
            finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
            self._file.write(printable(json.dumps(finite, ensure_ascii=False) + "\n").encode())
            self._count(record)
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Makes `out` of the rows. `summary` is kept with the counts."""
        self._file.close()
        run = {"settings": self.settings, "counts": self.counts, **summary}
        # Before the result, so that a result that is there has its counts.
        write_whole(self.run, json.dumps(run, indent=2, default=str))
        if self.out.suffix == ".parquet":
            with whole_file(self.out) as whole:
                _write_parquet(self.part, whole, self.types)
            self.part.unlink()
        else:
            os.replace(self.part, self.out)
        self.complete, self.finished = True, run


def _record(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None if the line is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _write_parquet(part: Path, whole: Path, types: Mapping[str, str]) -> None:
    import pyarrow as pa

    def rows() -> Iterator[dict[str, Any]]:
        with open(part, encoding="utf-8") as file:
            yield from map(json.loads, file)

    # Kept columns hold what their source holds: one pass to learn of what type that is.
    seen: dict[str, set[type]] = {}
    for record in rows():
        for name, value in record.items():
            seen.setdefault(name, set()).add(type(value))
    arrow = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}
    arrow |= {"ints": pa.list_(pa.int64()), "floats": pa.list_(pa.float64())}
    kinds = {name: types.get(name) or _kind(found - {type(None)}) for name, found in seen.items()}
    schema = pa.schema([(name, arrow[kind]) for name, kind in kinds.items()])
    with parquet_library().ParquetWriter(whole, schema) as writer:
        for chunk in batches(rows(), CHUNK):
            for record in chunk:
                for name, value in record.items():
                    if kinds[name] == "str" and not isinstance(value, str | None):
                        record[name] = json.dumps(value)
            writer.write_table(pa.Table.from_pylist(chunk, schema))


def _kind(found: set[type]) -> str:
    if found in ({bool}, {int}):
        return found.pop().__name__
    return "float" if found and found <= {int, float} else "str"


__all__ = ["Journal"]
