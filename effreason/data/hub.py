"""Rows of data sets on the Hugging Face Hub or in its cache, and errors that say what to do."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effreason.data.files import SAVED_FILES, Rows, one_line
from effreason.runtime.errors import UserError

COMMIT = re.compile(r"[0-9a-f]{7,40}")
CONNECT_SECONDS = 10


def hub_rows(name: str, subset: str | None, split: str) -> Rows:
    """Yields the rows of a data set: org/name, or org/name@revision, a commit, tag or branch."""
    bare, _, revision = name.partition("@")
    for number, row in enumerate(_load(bare, subset, split, revision or None)):
        yield f"{name}:{split}:{number}", row


def _load(name: str, subset: str | None, split: str,
          revision: str | None) -> Sequence[dict[str, Any]]:
    """Downloads a data set, or reads it from the cache if HF_HUB_OFFLINE=1."""
    import datasets
    import huggingface_hub

    offline = bool(huggingface_hub.constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE)
    try:
        commit, is_saved = _state(name, revision, offline)
        if is_saved:
            folder = datasets.load_from_disk(huggingface_hub.snapshot_download(
                name, repo_type="dataset", revision=commit, local_files_only=offline))
            return folder if isinstance(folder, datasets.Dataset) else folder[split]
        loaded = datasets.load_dataset(name, subset, split=split, revision=commit)
    except Exception as error:      # of three libraries without a closer common ancestor
        full_name = name if revision is None else f"{name}@{revision}"
        description = _describe(error, subset, split, revision, offline)
        raise UserError(f"{full_name}: {description}") from None
    if offline and revision is not None:
        _check_cached(name, revision, [file["filename"] for file in loaded.cache_files])
    return loaded


def _state(name: str, revision: str | None, offline: bool) -> tuple[str | None, bool]:
    """Returns the commit of a data set, and whether it is a folder written by `save_to_disk`.

    Also fails early: `datasets` retries for half a minute before it reports an unreachable Hub."""
    import huggingface_hub

    if offline:
        cached = [huggingface_hub.try_to_load_from_cache(name, file, repo_type="dataset",
                                                         revision=revision) for file in SAVED_FILES]
        return revision, any(isinstance(path, str) for path in cached)

    info = huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=CONNECT_SECONDS)
    return info.sha, any(file.rfilename in SAVED_FILES for file in info.siblings or ())


def _check_cached(name: str, revision: str, files: Sequence[str]) -> None:
    """Raises UserError unless the files are of the commit: offline, `datasets` uses the newest.

    They are in a folder with the commit's name; the cache has no tags and branches."""
    if not COMMIT.fullmatch(revision):
        raise UserError(f"{name}@{revision}: the cache knows only commits, and HF_HUB_OFFLINE or "
                        "HF_DATASETS_OFFLINE is set; name the commit")

    folders = {Path(file).parent.name for file in files}
    if not all(folder.startswith(revision) for folder in folders):
        raise UserError(f"{name}@{revision}: the newest in the cache is another commit, "
                        f"{', '.join(folders)}, and HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set")


def _describe(error: Exception, subset: str | None, split: str, revision: str | None,
              offline: bool) -> str:
    """Returns what went wrong with the Hub, and what to do about it."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    message = one_line(error)
    if "GatedRepoError" in kinds or "gated" in message:
        return ("is gated: accept its conditions on its page on the Hugging Face Hub, then log in "
                "(hf auth login) or set HF_TOKEN")
    if "RevisionNotFoundError" in kinds:
        return f"has no commit, tag or branch {revision!r}"
    if "RepositoryNotFoundError" in kinds:
        return ("is no file here and not on the Hugging Face Hub, or private: check the name, or "
                "log in (hf auth login)")
    if "Config name is missing" in message or "BuilderConfig" in message:
        missing = "" if subset is None else f", which has no {subset!r}"
        return f"needs data.subset{missing} ({message})"
    if "Unknown split" in message or isinstance(error, KeyError):
        return (f"has no split {split!r} ({message}); data.split or evaluation.split must name one")
    if offline:
        return ("is no file here and not in the cache, and HF_HUB_OFFLINE or HF_DATASETS_OFFLINE "
                "is set")
    if {"TransportError", "ConnectionError", "TimeoutError"} & kinds:
        return ("is no file here, and the Hugging Face Hub cannot be reached: check the network, "
                "set HF_HUB_OFFLINE=1 to use the cache, or name local files")
    return f"cannot be read from the Hugging Face Hub ({message})"
