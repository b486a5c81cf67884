"""Java programs behind caption scores: PTB tokenizer, METEOR, SPICE's needs."""

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR
from tqdm import tqdm

# By default METEOR reads numbers in the language of the machine, and text in its encoding.
JAVA_OPTIONS = ("-XX:+UseSerialGC", "-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")
METEOR_OPTIONS = ("-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm")
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
SPICE_ARCHIVE = "https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"


def scorer_folder(name: str) -> Path:
    """Folder of pycocoevalcap that holds the jars of "meteor", "spice" or "tokenizer"."""
    return Path(find_spec(f"pycocoevalcap.{name}").submodule_search_locations[0])


def require_java(purpose: str) -> str:
    """Path of the `java` program; RuntimeError where there is none, saying what to install."""
    java = shutil.which("java")
    if java is None:
        raise RuntimeError(
            f"{purpose} needs Java 8 or newer, and no program `java` is on PATH. Install one (Debian and Ubuntu: "
            "`apt-get install default-jre-headless`; conda: `conda install -c conda-forge openjdk`), or choose "
            '`tokenizer="plain"` and metrics out of "bleu", "rouge_l" and "cider", which run without Java and are '
            "labelled as scores on a plain tokenization."
        )
    return java


def require_spice() -> None:
    """Raises RuntimeError where SPICE lacks Java or jars, saying where they belong; its own code would try to
    download them."""
    require_java("SPICE")
    folder = scorer_folder("spice") / "lib"
    if missing := [name for name in SPICE_JARS if not (folder / name).is_file()]:
        raise RuntimeError(
            f"SPICE needs Stanford CoreNLP 3.6.0; missing in {folder}: {', '.join(missing)}. Take the jars of these "
            f'names out of {SPICE_ARCHIVE} and put them there, or leave "spice" out of `metrics`.'
        )


def ptb_tokenize(texts: Sequence[str]) -> list[str]:
    """The words of each text (of one line), joined by spaces, as COCO's caption evaluation makes them: lower case,
    without punctuation; RuntimeError if Java is missing or fails."""
    java = require_java("The PTB tokenizer")
    command = [java, *JAVA_OPTIONS, "-cp", STANFORD_CORENLP_3_4_1_JAR, "edu.stanford.nlp.process.PTBTokenizer"]
    # Texts go through standard input: pycocoevalcap's class writes them beside its code, where users may not write.
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"],
        input="".join(f"{text}\n" for text in texts).encode(),
        capture_output=True,
        cwd=scorer_folder("tokenizer"),
        check=False,
    )
    lines = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(lines) != len(texts):
        raise RuntimeError(
            f"The PTB tokenizer gave {len(lines)} lines for {len(texts)} (exit status {done.returncode}): "
            f"{done.stderr.decode(errors='replace').strip()}"
        )
    return [" ".join(word for word in line.split() if word not in PUNCTUATIONS) for line in lines]


class Meteor:
    """METEOR 1.5 of pycocoevalcap as a context manager: its program ends with the block, whatever happens inside.
    RuntimeError if Java is missing or the program fails."""

    def __enter__(self) -> "Meteor":
        java = require_java("METEOR")
        # A file and not a pipe, which nobody would read and which could fill up.
        self._errors = TemporaryFile()
        self._process = subprocess.Popen(
            [java, *JAVA_OPTIONS, *METEOR_OPTIONS],
            cwd=scorer_folder("meteor"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        # Reaps the process and closes both pipes.
        self._process.communicate()
        self._errors.close()

    def statistics(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray:
        """Counts of METEOR's matches between each prediction and its best reference, as floats [images, statistics];
        the sum of rows is the statistics of a corpus."""
        rows = []
        for prediction, candidates in tqdm(
            zip(predictions, references, strict=True), "METEOR", len(predictions), leave=False, disable=None
        ):
            # The separator of METEOR's own protocol.
            self._write("SCORE", [text.replace("|||", " ") for text in (*candidates, prediction)])
            rows.append([float(number) for number in self._read().split()])
        return np.array(rows)

    def scores(self, statistics: NDArray) -> tuple[NDArray, float]:
        """Scores of each row of `statistics` [rows, statistics], and of their sum."""
        self._write("EVAL", (" ".join(map(repr, row)) for row in statistics.tolist()))
        values = [float(self._read()) for _ in range(len(statistics) + 1)]
        return np.array(values[:-1]), values[-1]

    def _write(self, command: str, parts: Iterable[str]) -> None:
        try:
            self._process.stdin.write(f"{' ||| '.join((command, *parts))}\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure() from error

    def _read(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        return line

    def _failure(self) -> RuntimeError:
        status = self._process.wait()
        self._errors.seek(0)
        return RuntimeError(f"METEOR ended early (exit status {status}): {self._errors.read().decode().strip()}")


__all__ = ["Meteor", "ptb_tokenize", "require_java", "require_spice"]
