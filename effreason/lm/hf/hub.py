"""Models on the Hugging Face Hub: from a name to a directory in its cache, or one line that says what to do.

A snapshot is fetched in two parts: the small files when a model is opened, the weights when they are read; mistakes in
the data show before 15 GB are on their way. Everything of a run comes from one commit.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import validate_repo_id

from effreason.runtime.errors import UserError

# What a request may raise; ValueError is for an answer that is no JSON, such as the log-in page of a network.
FAILURES = (OSError, ValueError, errors.HTTPError)
TIMEOUT_SECONDS = 10.0              # for the first answer of the Hub
WEIGHTS = re.compile(r"model.*\.safetensors(\.index\.json)?")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form organisation/name; one of a directory may have it too."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return name.count("/") == 1


def public_name(name: str) -> str:
    """Returns the name of a model or data set for others: of a path on this machine the last part."""
    path = Path(name)
    return path.name if path.name and (path.is_absolute() or path.exists()) else name


def find(name: str, revision: str | None, small_files: Sequence[str]) -> tuple[Path, str | None]:
    """The directory of a model, and the commit of one on the Hub, whose small files it then holds.

    Args: name, a directory or a Hub id; a directory goes first. revision, branch, tag or commit on the Hub.
    Raises: UserError."""
    directory = standing(Path(name)) if name else None
    if directory is not None:
        if revision is not None:
            raise UserError(f"model.revision is for a model on the Hub, {name} is a directory, got {revision}")
        return directory, None
    if name and Path(name).exists():
        raise UserError(f"{name} is a file, expected a model's directory or its id on the Hugging Face Hub")
    if not is_hub_id(name):
        raise UserError(f"{name}: no such directory; a model on the Hugging Face Hub is named organisation/name")
    snapshot = _open_snapshot(name, revision, small_files)
    if not (snapshot / "config.json").exists():
        raise UserError(f"{name}: has no config.json, it is no model that transformers could load")
    return snapshot, snapshot.name


def standing(directory: Path) -> Path | None:
    """The directory, or what an export killed between its last two renames has left in its place; None without."""
    for suffix in ("", ".partial", ".old"):
        # A partial export is whole only once the old one has made room for it.
        if suffix == ".partial" and not directory.with_name(directory.name + ".old").is_dir():
            continue
        if (found := directory.with_name(directory.name + suffix) if suffix else directory).is_dir():
            return found
    return None


def fetch(name: str, commit: str, wanted: Sequence[str]) -> Path:
    """Brings more files of an opened snapshot into the cache; without a request where they are there already."""
    cached = _cached(name, commit, wanted)
    if cached is not None and all((cached / file).exists() for file in wanted):
        return cached
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=commit, allow_patterns=list(wanted)))
    except FAILURES as error:
        raise _explained(error, name, commit) from None


def _open_snapshot(name: str, revision: str | None, small_files: Sequence[str]) -> Path:
    """The snapshot with its small files; as it is in the cache, where the Hub cannot be asked."""
    try:
        # One request without repetitions: a download would try for 20 s to reach a Hub that is not there.
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=TIMEOUT_SECONDS)
        _check_listing(name, [file.rfilename for file in info.siblings or ()])
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(small_files)))
    except FAILURES as error:
        if cached := _cached(name, revision, small_files):
            return cached
        raise _explained(error, name, revision) from None


def _cached(name: str, revision: str | None, wanted: Sequence[str]) -> Path | None:
    """The snapshot in the cache, unless it is known to lack one of the files wanted."""
    try:
        path = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(wanted),
                                                      local_files_only=True))
    except OSError:
        return None
    return path if (path / "config.json").exists() else None


def _check_listing(name: str, listed: Sequence[str]) -> None:
    """Raises UserError for a repository that cannot become a model, from the names of its files."""
    if "config.json" not in listed:
        raise UserError(f"{name}: has no config.json on the Hub, it is no model that transformers could load")
    if not any(WEIGHTS.fullmatch(file) for file in listed):
        held = "only weights pickled by PyTorch" if any(file.endswith(".bin") for file in listed) else "no weights"
        raise UserError(f"{name}: holds {held} on the Hub, expected model.safetensors; convert them by save_pretrained "
                        "of transformers and pass the directory")


def _explained(error: Exception, name: str, revision: str | None) -> UserError:
    """What a user can do about a failed request, in one line."""
    page = f"{constants.ENDPOINT}/{name}"
    at = "" if revision is None else f" --revision {revision}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{name}: its licence must be accepted first: do so at {page}, log in with `hf auth login`, "
                         "and start again")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{name}: has no branch, tag or commit {revision!r} on the Hub, see {page}/commits/main")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(f"{name}: neither a directory here nor a model on the Hugging Face Hub; check the name, or, "
                         "if it is private, log in with `hf auth login`")
    if status in (401, 403):
        return UserError(f"{name}: the Hub denies access ({status}); log in with `hf auth login` as someone who may "
                         f"read {page}")
    reason = " ".join(str(_root(error)).split()) or type(error).__name__
    if isinstance(error, errors.OfflineModeIsEnabled) or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set"
    return UserError(f"{name}: no directory here, not in the cache of the Hugging Face Hub, and not to be had from it "
                     f"({reason[:120]}); elsewhere, `hf download {name}{at} --local-dir DIR`, then pass DIR")


def _root(error: BaseException) -> BaseException:
    """The first cause of an error: the Hub's own wording speaks of its options."""
    while (cause := error.__cause__) is not None:
        error = cause
    return error
