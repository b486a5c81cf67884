"""Puts a checkpoint, the code that loads it and its model card into a folder or on the Hugging Face Hub."""

import json
import os
import shutil
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from ..evaluation.plots import draw_plots
from ..files import whole_folder, write_whole
from ..model.configuration_mue import MuEConfig
from ..model.graph_files_mue import FOLDER, MANIFEST, read_manifest
from ..model.presets_mue import weights_fingerprint
from ..model.processing_mue import MuEProcessor
from .checkpoint import WEIGHTS_INDEX, check_folder, load_complete_model, matching_records, preset_dtypes, weight_files
from .model_card import About, evaluation_groups, public_record, read_evaluation, render_card

# What an older state of the repository may have and the new one lacks: loaders would take it for a part of the new.
REPLACED = ["*_mue.py", "model*.safetensors", WEIGHTS_INDEX, f"{FOLDER}/*", "evaluation.jsonl", "evaluation-*.png"]


def write_card(
    checkpoint: Path,
    card: Path,
    model_id: str,
    about: About,
    evaluation: str | os.PathLike | None = None,
    stem: str = "evaluation",
) -> None:
    """Writes a checkpoint's card, beside it the records that it shows, and a plot for each table of several points.

    Args:
        checkpoint (`Path`): a folder that passed [`check_folder`].
        card (`Path`): the file.
        model_id, about, evaluation: see [`publish_to_folder`].
        stem (`str`, *optional*, defaults to `"evaluation"`): what the names of records and plots begin with.

    Raises:
        ValueError: see [`matching_records`] and [`preset_dtypes`]; nothing is written then.
        ImportError: if the extras that evaluations need are not installed.
    """
    model = load_complete_model(checkpoint)

    @cache
    def fingerprint(dtype: str) -> str | None:
        return weights_fingerprint(model if dtype == "float32" else load_complete_model(checkpoint, dtype))

    dtypes, records = preset_dtypes(checkpoint, model, fingerprint), []
    if evaluation is not None:
        measured = matching_records(checkpoint, model, fingerprint, read_evaluation(evaluation))
        records = [public_record(record, model_id) for record in measured]
    groups = evaluation_groups(records)
    # One point makes no curve.
    names = [f"{stem}-{number}.png" if len(group) > 1 else "" for number, group in enumerate(groups, start=1)]
    # A checkpoint's own card says what its folder has; all else that cards describe carries the code.
    carries_code = Path(model_id).resolve() != checkpoint.resolve() or (checkpoint / "configuration_mue.py").is_file()
    text = render_card(model, model_id, about, groups, names, dtypes, carries_code)
    card.parent.mkdir(parents=True, exist_ok=True)
    for group, name in zip(groups, names, strict=True):
        if name:
            with TemporaryDirectory(dir=card.parent) as folder:
                draw_plots(group, folder)
                os.replace(Path(folder, "quality_flops.png"), card.with_name(name))
    if records:
        write_whole(card.with_name(f"{stem}.jsonl"), "".join(json.dumps(record) + "\n" for record in records))
    write_whole(card, text)


def stage(
    checkpoint: Path,
    folder: Path,
    model_id: str,
    about: About,
    evaluation: str | os.PathLike | None = None,
    link: bool = False,
) -> list[Path]:
    """Puts all that is published into an empty folder, and returns the files.

    Configurations and source files are written by the installed package, so that they fit each other; weights, graphs
    of `mue-hf export` and generation config are those of the checkpoint, byte for byte.

    Args:
        checkpoint, model_id, about, evaluation: see [`publish_to_folder`].
        folder (`Path`): the empty folder.
        link (`bool`, *optional*, defaults to `False`): True links weights and graphs where links can be made.

    Raises:
        ValueError, ImportError: see [`check_folder`], [`load_complete_model`], [`read_manifest`] and [`write_card`].
    """
    check_folder(checkpoint)
    exported = [checkpoint / FOLDER / MANIFEST] if (checkpoint / FOLDER / MANIFEST).is_file() else []
    if exported:
        graphs = read_manifest(checkpoint, whole=True)["graphs"].values()
        exported += [checkpoint / FOLDER / graph[kind] for graph in graphs for kind in ("file", "data")]
    write_card(checkpoint, folder / "README.md", model_id, about, evaluation)
    MuEConfig.from_pretrained(checkpoint).save_pretrained(str(folder))
    MuEProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    shutil.copyfile(checkpoint / "generation_config.json", folder / "generation_config.json")
    for path in (*weight_files(checkpoint), *exported):
        target = folder / path.relative_to(checkpoint)
        target.parent.mkdir(exist_ok=True)
        (_link if link else shutil.copyfile)(path, target)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)


def publish_to_folder(
    checkpoint: Path,
    target: Path,
    model_id: str,
    about: About,
    evaluation: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Writes all that [`upload`] would send into a new folder, whole or not at all; it loads without this package.

    Args:
        checkpoint (`Path`): a checkpoint folder.
        target (`Path`): the folder, which must be empty or none yet.
        model_id (`str`): the Hub id or folder by which the card says that readers load the model.
        about ([`About`]): what the card states.
        evaluation (path, *optional*): records of `mue-hf evaluate`; what is written of them is in [`public_record`].
        overwrite (`bool`, *optional*, defaults to `False`): True replaces a checkpoint that is there.

    Returns:
        `list[Path]`: the files.

    Raises:
        ValueError: if something else is in `target`, or the checkpoint itself, or if the checkpoint, its presets or
            the records are not whole and of one state.
        ImportError: if there are records and matplotlib is missing.
    """
    if checkpoint.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"`--to` must be another folder than that of the checkpoint, got {target}; choose another.")
    with whole_folder(target, overwrite) as folder:
        files = [path.relative_to(folder) for path in stage(checkpoint, folder, model_id, about, evaluation)]
    return [target / path for path in files]


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> str:
    """Sends a staged folder to the Hub, as one commit; makes the repository and the branch if they do not exist.

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
        place: dict[str, Any] = {"repo_id": repo_id, "revision": revision, "create_pr": create_pr}
        message = "Publish the checkpoint with mue-hf"
        commit = api.upload_folder(folder_path=folder, commit_message=message, delete_patterns=REPLACED, **place)
    # What huggingface_hub makes of a file that did not arrive: RuntimeError, and where it uses Xet the other two.
    except (HfHubHTTPError, httpx.HTTPError, RuntimeError, ConnectionError, TimeoutError) as error:
        raise OSError(_explain(error, repo_id)) from error
    return commit.pr_url or commit.commit_url


def _explain(error: Exception, repo_id: str) -> str:
    details = getattr(error, "server_message", None) or ""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
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


__all__ = ["publish_to_folder", "stage", "upload", "write_card"]
