"""`mue-hf publish`: puts a checkpoint, the code that loads it and its model card on the Hugging Face Hub."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx, validate_repo_id
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedModel

from ..files import write_whole
from ..model.configuration_mue import MuEConfig
from ..model.exit_options_mue import resolve_options
from ..model.generation_mue import weights_fingerprint
from ..model.modeling_mue import MuEForConditionalGeneration
from ..model.processing_mue import MuEProcessor
from .model_card import (
    About,
    evaluation_groups,
    public_record,
    read_about,
    read_evaluation,
    render_card,
)

EPILOG = """examples:
  mue-hf publish my-checkpoint my-name/mue-captioner --about about.toml --evaluation runs/captions.jsonl --dry-run
  mue-hf publish my-checkpoint my-name/mue-captioner --about about.toml --evaluation runs/captions.jsonl --private

The repository gets the weights, the configurations, the generation config with its exit presets, the source files that
load the model where this package is not installed, a model card and the evaluation records. The card is written anew
each time: edits on the Hub are lost. Log in with `hf auth login`, set HF_TOKEN, or pass --token.
Exit codes: 0 done, 2 bad input or the Hub refused, 130 interrupted. After an interruption run the same command again:
weights that have arrived are not sent twice."""

NEEDED = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("float32", "bfloat16", "float16")
# What an older state of the repository may have and the new one lacks: loaders would take it for a part of the new.
REPLACED = ["model*.safetensors", WEIGHTS_INDEX, "evaluation.jsonl", "evaluation-*.png"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `mue-hf publish` takes."""
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint folder, of `save_pretrained` or a trainer")
    parser.add_argument("name", metavar="ORG/NAME", help="repository of the Hub; made if it does not exist")
    card = parser.add_argument_group("model card")
    card.add_argument(
        "--about",
        metavar="FILE.toml",
        help="what the card states: summary, language, base_model, datasets, training, license, license_name, "
        "license_link, license_note, commands, limits, data_names",
    )
    card.add_argument(
        "--evaluation",
        metavar="FILE.jsonl",
        help="records of `mue-hf evaluate` on these weights; needs the extras train and eval",
    )
    target = parser.add_argument_group("where to")
    either = target.add_mutually_exclusive_group()
    either.add_argument("--revision", metavar="BRANCH", help="made if it does not exist (default: main)")
    either.add_argument("--create-pr", action="store_true", help="propose the files in a pull request")
    target.add_argument("--private", action="store_true", help="of a new repository: only its owners see it")
    target.add_argument("--token", help="default: HF_TOKEN, or that of `hf auth login`")
    instead = parser.add_argument_group("in place of publishing").add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="list the files with their sizes and send nothing")
    instead.add_argument("--card", type=Path, metavar="FILE.md", help="write the card, its records and plots there")


def weight_files(folder: Path) -> list[Path]:
    """
    The files that `from_pretrained` reads weights from, the index of several among them.

    Raises:
        ValueError: if there are none, or some of several are missing.
    """
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not index.is_file():
        raise ValueError(
            f"{folder} must hold safetensors weights, got neither {WEIGHTS} nor {WEIGHTS_INDEX}; load the model and "
            "save it with `model.save_pretrained`."
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} must list the weights, got {error!r}; save the model again.") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {missing}, which {WEIGHTS_INDEX} lists; copy them, or save the model again.")
    return [index, *(folder / name for name in names)]


def check_folder(folder: Path) -> None:
    """
    Looks for what a published checkpoint must have, before anything is loaded.

    Raises:
        ValueError: if it is no folder with a MuE model, or lacks files.
    """
    if not folder.is_dir():
        raise ValueError(f"the checkpoint must be a folder, got {folder}; download or convert it first.")
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}; save the model and its processor there with `save_pretrained`."
        )
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} must be JSON: {error}; save the model again.") from error
    if model_type != "mue":
        raise ValueError(
            f'the checkpoint must have model_type "mue", got {model_type!r} in {folder}; `mue-hf convert` makes one '
            "from an OFA checkpoint."
        )
    weight_files(folder)


def load_model(folder: Path, dtype: str = "float32") -> MuEForConditionalGeneration:
    """
    The model of a checkpoint folder.

    Raises:
        ValueError: if the weights are damaged or are not all that the configuration asks for.
    """
    try:
        # The annotation of `from_pretrained` does not know that it may return two things.
        loaded: Any = MuEForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, dtype), output_loading_info=True
        )
        model, info = loaded
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} cannot be loaded: {error}; save the model again.") from error
    if info["missing_keys"]:
        raise ValueError(
            f"the weights in {folder} lack {len(info['missing_keys'])} tensors, {sorted(info['missing_keys'])[0]} "
            "among them; save the model again."
        )
    return model.eval()


class Fingerprints:
    """Those of a checkpoint folder's weights by dtype, each loaded when it is first asked for."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.folder = folder
        self.known = {"float32": weights_fingerprint(model)}

    def __getitem__(self, dtype: str) -> str | None:
        if dtype not in self.known:
            self.known[dtype] = weights_fingerprint(load_model(self.folder, dtype))
        return self.known[dtype]


def matching_records(
    model: PreTrainedModel, fingerprints: Fingerprints, records: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """
    The records that were measured on the weights and presets of a checkpoint folder.

    Raises:
        ValueError: if none was measured on these weights, or one with thresholds that its preset has no more.
    """
    kept = [record for record in records if record["weights_fingerprint"] == fingerprints[record["dtype"]]]
    if not kept:
        raise ValueError(
            f"`--evaluation` must hold records of the weights in {fingerprints.folder}, got {len(records)} of other "
            "weights; run `mue-hf evaluate` on this checkpoint."
        )
    saved = model.generation_config.to_dict()
    for record in kept:
        if record["criterion"] == "presets" and "options" in record:
            now = asdict(resolve_options(record["exits"], {}, saved, model.config))
            # those say what is run, not what comes out
            costs = {"exit_costs": None}
            if json.loads(json.dumps(now | costs)) != record["options"] | costs:
                raise ValueError(
                    f"the preset {record['name']!r} was evaluated with other thresholds than it has now; run `mue-hf "
                    "evaluate` again."
                )
    return kept


def preset_dtypes(fingerprints: Fingerprints, presets: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """
    In which dtype each calibrated preset holds.

    Raises:
        ValueError: if one was calibrated on other weights.
    """
    dtypes = {}
    for name, preset in presets.items():
        expected = preset.get("weights_fingerprint")
        if expected is None:
            continue
        found = next((dtype for dtype in DTYPES if fingerprints[dtype] == expected), None)
        if found is None:
            raise ValueError(
                f"the preset {name!r} was calibrated on other weights than those in {fingerprints.folder}: what it "
                "promises does not hold; run `mue-hf calibrate` again, or remove it from generation_config.json."
            )
        dtypes[name] = found
    return dtypes


def write_card(
    checkpoint: Path,
    card: Path,
    model_id: str,
    about: About,
    evaluation: str | os.PathLike | None = None,
    stem: str = "evaluation",
) -> None:
    """
    Writes the card of a checkpoint folder, beside it the records that it shows, and a plot for each table of several
    points.

    Args:
        checkpoint (`Path`): a folder that passed [`check_folder`].
        card (`Path`): the file.
        model_id (`str`): Hub id or folder by which readers load the model.
        about ([`About`]): what the card states.
        evaluation (path, *optional*): records of `mue-hf evaluate`; what is written of them is in [`public_record`].
        stem (`str`, *optional*, defaults to `"evaluation"`): what the names of records and plots begin with.

    Raises:
        ValueError: see [`matching_records`] and [`preset_dtypes`]; nothing is written then.
        ImportError: if the extras that evaluations need are not installed.
    """
    model = load_model(checkpoint)
    fingerprints = Fingerprints(checkpoint, model)
    dtypes = preset_dtypes(fingerprints, getattr(model.generation_config, "exit_presets", None) or {})
    records: list[Mapping[str, Any]] = []
    if evaluation is not None:
        records = matching_records(model, fingerprints, read_evaluation(evaluation))
        records = [public_record(record, model_id) for record in records]
    groups = evaluation_groups(records)
    # One point makes no curve.
    names = [f"{stem}-{number}.png" if len(group) > 1 else "" for number, group in enumerate(groups, start=1)]
    text = render_card(model, model_id, about, groups, names, dtypes)
    card.parent.mkdir(parents=True, exist_ok=True)
    for group, name in zip(groups, names, strict=True):
        if name:
            _draw(group, card.with_name(name))
    if records:
        write_whole(card.with_name(f"{stem}.jsonl"), "".join(json.dumps(record) + "\n" for record in records))
    write_whole(card, text)


def _draw(group: Sequence[Mapping[str, Any]], target: Path) -> None:
    """The plot of quality against FLOPs skipped."""
    from ..evaluation.plots import draw_plots

    with TemporaryDirectory(dir=target.parent) as folder:
        draw_plots(group, folder)
        os.replace(Path(folder) / "quality_flops.png", target)


def stage(
    checkpoint: Path, folder: Path, repo_id: str, about: About, evaluation: str | os.PathLike | None = None
) -> list[Path]:
    """
    Puts all that a repository gets into a folder.

    Configurations and source files are written by the installed package, so that they fit each other; weights and
    generation config are those of the checkpoint, byte for byte.

    Args:
        checkpoint (`Path`): a checkpoint folder.
        folder (`Path`): an empty folder; weights are linked into it where links can be made.
        repo_id (`str`): the repository that the card names.
        about ([`About`]): what the card states.
        evaluation (path, *optional*): records of `mue-hf evaluate`.

    Returns:
        `list[Path]`: the files.

    Raises:
        ValueError, ImportError: see [`check_folder`], [`load_model`] and [`write_card`].
    """
    check_folder(checkpoint)
    write_card(checkpoint, folder / "README.md", repo_id, about, evaluation)
    MuEConfig.from_pretrained(checkpoint).save_pretrained(str(folder))
    MuEProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    shutil.copyfile(checkpoint / "generation_config.json", folder / "generation_config.json")
    for path in weight_files(checkpoint):
        try:
            (folder / path.name).symlink_to(path.resolve())
        except OSError:
            shutil.copyfile(path, folder / path.name)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """
    Sends a staged folder to the Hub, as one commit; makes the repository and the branch if they do not exist.

    Args:
        folder (`Path`): see [`stage`].
        repo_id (`str`): "ORG/NAME".
        private (`bool`, *optional*, defaults to `False`): of a new repository.
        revision (`str`, *optional*, defaults to the main branch): a branch.
        create_pr (`bool`, *optional*, defaults to `False`): proposes the files instead.
        token (`str`, *optional*): HF_TOKEN, or that of `hf auth login`, by default.

    Returns:
        `str`: address of the commit or of the pull request.

    Raises:
        ValueError: if the repository should be private and exists in public.
        OSError: if the Hub refuses or cannot be reached, saying what to do.
    """
    api = HfApi(token=token, library_name="mue-hf", library_version=version("mue-hf"))
    try:
        # None leaves the choice to the owner's settings.
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise ValueError(
                f"{repo_id} exists and everybody can see it, but `--private` was passed; make it private in its "
                "settings, choose another name, or drop `--private`."
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Publish the checkpoint with mue-hf",
            revision=revision,
            create_pr=create_pr,
            delete_patterns=REPLACED,
        )
    # What huggingface_hub makes of a file that did not arrive: RuntimeError, and where it uses Xet the other two.
    except (HfHubHTTPError, httpx.HTTPError, RuntimeError, ConnectionError, TimeoutError) as error:
        raise OSError(_explain(error, repo_id)) from error
    return commit.pr_url or commit.commit_url


def _explain(error: Exception, repo_id: str) -> str:
    status, details = None, ""
    if isinstance(error, HfHubHTTPError):
        status, details = error.response.status_code, error.server_message or ""
    if status == 401:
        return (
            f"the Hub does not accept the token, or there is none (401: {details}). Log in with `hf auth login`, or "
            "pass a token with write access in HF_TOKEN or `--token`."
        )
    if status == 403:
        return (
            f"{repo_id} cannot be written with this token (403: {details}). The name belongs to someone else, or the "
            "token may only read: choose a name of your own, pass a token with write access, or propose the files to "
            "the owners with `--create-pr`."
        )
    reason = str(error.__cause__ or error).strip().splitlines()
    return (
        f"the upload to {repo_id} did not finish ({reason[0] if reason else type(error).__name__}). Run the same "
        "command again: weights that have arrived are not sent twice."
    )


def _listing(files: Sequence[Path], folder: Path) -> str:
    sizes = [path.stat().st_size for path in files]
    lines = [
        f"  {tqdm.format_sizeof(size, 'B'):>7}  {path.relative_to(folder)}"
        for size, path in zip(sizes, files, strict=True)
    ]
    return "\n".join([*lines, f"  {tqdm.format_sizeof(sum(sizes), 'B'):>7}  in {len(files)} files"])


def run(args: argparse.Namespace) -> int:
    """Publishes, lists, or writes the card alone.

    Returns:
        `int`: 0.
    """
    validate_repo_id(args.name)
    if "/" not in args.name:
        raise ValueError(f"the repository must be named ORG/NAME, got {args.name!r}; put your name or team before it.")
    checkpoint = Path(args.checkpoint)
    about = About() if args.about is None else read_about(args.about)
    if args.card is not None:
        check_folder(checkpoint)
        write_card(checkpoint, args.card, args.name, about, args.evaluation, f"{args.card.stem}.evaluation")
        sys.stdout.write(f"{args.card}\n")
        return 0
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = stage(checkpoint, folder, args.name, about, args.evaluation)
        sys.stdout.write(_listing(files, folder) + "\n")
        sys.stdout.flush()
        if args.dry_run:
            sys.stdout.write("Nothing was sent.\n")
            return 0
        address = upload(
            folder,
            args.name,
            private=args.private,
            revision=args.revision,
            create_pr=args.create_pr,
            token=args.token,
        )
    sys.stdout.write(f"{address}\n")
    return 0


__all__ = ["add_arguments", "check_folder", "load_model", "run", "stage", "upload", "weight_files", "write_card"]
