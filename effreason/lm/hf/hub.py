"""Models on the Hugging Face Hub: a name becomes a directory in its cache, or one clear error.

A snapshot is fetched in two parts: small files when a model is opened, weights when they are read.
So mistakes in the data show before 15 GB are downloaded. A run reads everything from one commit.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import validate_repo_id

from effreason.runtime.errors import UserError
from effreason.runtime.files import read_json

# What a request may raise; ValueError if the answer is not JSON, such as a network's log-in page.
FAILURES = (OSError, ValueError, errors.HTTPError)
TIMEOUT_SECONDS = 10.0              # for the first answer from the Hub
SINGLE_FILE, ADAPTER_FILE = "model.safetensors", "adapter_config.json"
WEIGHTS = re.compile(r"model.*\.safetensors(\.index\.json)?")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form organisation/name; a directory's may have it too."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return name.count("/") == 1


def public_name(name: str) -> str:
    """Returns a name that says something to others: of a local path, its last part."""
    path = Path(name)
    return path.name if path.name and (path.is_absolute() or path.exists()) else name


def find(name: str, revision: str | None, small_files: Sequence[str]) -> tuple[Path, str | None]:
    """Returns the directory of a model, and its commit if it is on the Hub.

    The small files of a model on the Hub are fetched into that directory.

    Args:
        name: A directory or a Hub id; a directory wins.
        revision: Branch, tag or commit on the Hub.

    Raises:
        UserError: There is no such model, or the Hub denies access or cannot be reached."""
    directory = existing_export(Path(name)) if name else None
    if directory is not None:
        if revision is not None:
            raise UserError(f"model.revision is for a model on the Hub, {name} is a directory, got "
                            f"{revision}")
        return model_directory(directory), None
    if name and Path(name).exists():
        raise UserError(f"{name} is a file, expected a model's directory or its id on the Hugging "
                        "Face Hub")
    if not is_hub_id(name):
        raise UserError(f"{name}: no such directory; a model on the Hugging Face Hub is named "
                        "organisation/name")

    snapshot = _open_snapshot(name, revision, small_files)
    return model_directory(snapshot), snapshot.name


def model_directory(directory: Path) -> Path:
    """Returns the directory with the config.json: this one, or the snapshot in a cache's folder.

    Raises: UserError if there is none, or an adapter; it says what there is instead."""
    if (directory / ADAPTER_FILE).exists():
        base = read_json(directory / ADAPTER_FILE).get("base_model_name_or_path")
        kind = ("holds no config.json, only an adapter" if is_adapter(directory) else
                "holds an adapter next to a model")
        raise UserError(f"{directory} {kind}: {ADAPTER_FILE}, made for {base}, such as LoRA's; "
                        "merge it into that model (merge_and_unload of peft), and pass the "
                        f"result, without {ADAPTER_FILE}")
    if os.path.lexists(directory / "config.json"):
        return directory

    main = directory / "refs" / "main"
    if main.is_file():
        snapshot = directory / "snapshots" / main.read_text(encoding="utf-8").strip()
        if (snapshot / "config.json").exists():
            return snapshot
    found = sorted(path.parent for pattern in ("*", "snapshots/*")
                   for path in directory.glob(f"{pattern}/config.json"))
    if len(found) == 1 and found[0].parent == directory / "snapshots":
        return found[0]
    hint = f"; did you mean {' or '.join(map(str, found[:3]))}?" if found else ""
    raise UserError(f"{directory} holds no config.json{hint}")


def is_adapter(directory: Path) -> bool:
    """Returns whether a directory holds adapters in the format of peft, and no model."""
    return (directory / ADAPTER_FILE).is_file() and not os.path.lexists(directory / "config.json")


def existing_export(directory: Path) -> Path | None:
    """Returns the directory, or the copy an interrupted export left; None if neither exists.

    Of a run it is the trained model."""
    if directory.is_dir():
        is_run = ((directory / "config.yaml").is_file()
                  and not os.path.lexists(directory / "config.json"))
        return (is_run and existing_export(directory / "model")) or directory

    partial, old = (directory.with_name(directory.name + suffix) for suffix in (".partial", ".old"))
    # A partial export is complete only once the old one has been moved away for it.
    if old.is_dir():
        return partial if partial.is_dir() else old
    return None


def fetch(name: str, commit: str, files: Sequence[str]) -> Path:
    """Fetches more files of an opened snapshot; sends no request if they are in the cache."""
    cached = _cached(name, commit, files)
    if cached is not None and all((cached / file).exists() for file in files):
        return cached
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=commit,
                                                      allow_patterns=list(files)))
    except FAILURES as error:
        raise _explain(error, name, commit) from None


def _open_snapshot(name: str, revision: str | None, small_files: Sequence[str]) -> Path:
    """Returns the snapshot with its small files; the cached one if the Hub is out of reach."""
    try:
        # One request without retries: a download would try for 20 s to reach an absent Hub.
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=TIMEOUT_SECONDS)
        listed = [file.rfilename for file in info.siblings or ()]
        _check_listing(name, listed)
        # An index next to the single file is out of date: transformers does not read it either.
        wanted = [file for file in small_files
                  if not (file.startswith(SINGLE_FILE) and SINGLE_FILE in listed)]
        return Path(huggingface_hub.snapshot_download(name, revision=revision,
                                                      allow_patterns=wanted))
    except FAILURES as error:
        if cached := _cached(name, revision, small_files):
            return cached
        raise _explain(error, name, revision) from None


def _cached(name: str, revision: str | None, files: Sequence[str]) -> Path | None:
    """Returns the snapshot in the cache, unless it is known to lack one of the files."""
    try:
        path = Path(huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(files), local_files_only=True))
    except OSError:
        return None
    return path if (path / "config.json").exists() else None


def _check_listing(name: str, listed: Sequence[str]) -> None:
    """Raises UserError if these files are not a model's."""
    if ADAPTER_FILE in listed:
        raise UserError(f"{name}: is an adapter on the Hub, such as LoRA's ({ADAPTER_FILE}); pass "
                        f"its directory: `hf download {name} --local-dir DIR`")
    if "config.json" not in listed:
        raise UserError(f"{name}: has no config.json on the Hub, it is not a model transformers "
                        "can load")
    if not any(WEIGHTS.fullmatch(file) for file in listed):
        is_pickled = any(file.endswith(".bin") for file in listed)
        kind = "only weights pickled by PyTorch" if is_pickled else "no weights"
        raise UserError(f"{name}: has {kind} on the Hub, expected {SINGLE_FILE}; convert them "
                        "with save_pretrained of transformers and pass the directory")


def _explain(error: Exception, name: str, revision: str | None) -> UserError:
    """Returns the error that says, in one line, what a user can do about a failed request."""
    page = f"{constants.ENDPOINT}/{name}"
    option = "" if revision is None else f" --revision {revision}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{name}: its licence must be accepted first: do so at {page}, log in "
                         "with `hf auth login`, and start again")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{name}: has no branch, tag or commit {revision!r} on the Hub, see "
                         f"{page}/commits/main")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(f"{name}: neither a directory here nor a model on the Hugging Face Hub; "
                         "check the name, or, if it is private, log in with `hf auth login`")
    if status in (401, 403):
        return UserError(f"{name}: the Hub denies access ({status}); log in with `hf auth login` "
                         f"as someone who may read {page}")

    reason = " ".join(str(_root(error)).split()) or type(error).__name__
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in (error, error.__cause__)):
        reason = "HF_HUB_OFFLINE is set"
    return UserError(f"{name}: no directory here, not in the cache of the Hugging Face Hub, and "
                     f"could not be downloaded ({reason[:120]}); elsewhere, `hf download "
                     f"{name}{option} --local-dir DIR`, then pass DIR")


def _root(error: BaseException) -> BaseException:
    """Returns the first cause of an error: the Hub's own message is about its options."""
    while (cause := error.__cause__) is not None:
        error = cause
    return error
