"""Reads Hugging Face models, from a directory or the Hub, and exports them to a directory."""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effreason.lm.hf import hub, weights
from effreason.lm.hf.config import exported_config, parse_config
from effreason.lm.hf.weights import read_weights, stored_dtype, weight_files, write_weights
from effreason.lm.model import DecoderConfig, Params
from effreason.runtime import processes
from effreason.runtime.errors import UserError
from effreason.runtime.files import read_json
from effreason.runtime.sharding import Shardings

SHIPPED_REASONER = Path(__file__).parents[2] / "data" / "tiny" / "reasoner"
TEMPLATE_FILE, TOKENIZER_FILE = "chat_template.jinja", "tokenizer_config.json"
CARD_FILE, FACTS_FILE = "README.md", "effreason.json"
# What another program needs besides the weights. The source's README is not ours to pass on.
COMPANIONS = ("config.json", "tokenizer.json", TOKENIZER_FILE, "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", TEMPLATE_FILE,
              "chat_template.json", "generation_config.json", "LICENSE", "LICENSE.md",
              "LICENSE.txt", "NOTICE", "USE_POLICY.md")
FINGERPRINT_BYTES = 2**20           # read from each end of a file of weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Everything a model's files say about it, without the weights."""

    name: str                       # as the user named it: "tiny", a directory or a Hub id
    revision: str | None            # the commit of a model on the Hub; None for a directory
    directory: Path                 # for a model on the Hub, its snapshot in the cache
    decoder: DecoderConfig
    tokenizer: Any                  # a transformers fast tokenizer
    eos_ids: tuple[int, ...]
    max_positions: int              # longest sequence the model was trained for


def open_pretrained(path: str, *, dtype: str, remat: str = "full",
                    revision: str | None = None) -> Pretrained:
    """Reads config, tokenizer and EOS ids, and checks that there are weights.

    Args:
        path: A directory, the id of a model on the Hub, whose small files are fetched, or "tiny",
            the reasoner that ships with the package.
        revision: A branch, tag or commit on the Hub.

    Raises:
        UserError: Names the file, or says how to get the model."""
    if path == "tiny" and revision is not None:
        raise UserError("model.revision is for a model on the Hub, model.path is tiny, got "
                        f"{revision}")
    name = str(SHIPPED_REASONER) if path == "tiny" else path
    directory, commit = hub.find(name, revision, (*COMPANIONS, FACTS_FILE, weights.INDEX_FILE))
    table = read_json(directory / "config.json")
    decoder = parse_config(table, directory / "config.json", dtype=dtype, remat=remat)
    if commit is None:
        weight_files(directory)

    tokenizer = load_tokenizer(directory)
    if len(tokenizer) > decoder.vocabulary:
        raise UserError(f"{directory}: the tokenizer has {len(tokenizer)} tokens, config.json's "
                        f"vocab_size is {decoder.vocabulary}")
    ids = eos_ids(directory, tokenizer)
    if max(ids) >= decoder.vocabulary:
        raise UserError(f"{directory}: eos_token_id must be below config.json's vocab_size, "
                        f"{decoder.vocabulary}, got {max(ids)}")

    decoder = dataclasses.replace(
        decoder, unused_ids=unused_ids(tokenizer, decoder.vocabulary, ids))
    positions = table.get("max_position_embeddings")
    if not isinstance(positions, int) or positions <= 0:
        positions = sys.maxsize
    return Pretrained(name=path, revision=commit, directory=directory, decoder=decoder,
                      tokenizer=tokenizer, eos_ids=ids, max_positions=positions)


def load_weights(pretrained: Pretrained, shardings: Shardings | None = None) -> Params:
    """Returns the weights of a model as `read_weights` does; fetches them if it is on the Hub.

    Raises:
        UserError: They cannot be fetched, or do not fit the model's config.json."""
    if pretrained.revision is not None:
        is_indexed = (pretrained.directory / weights.INDEX_FILE).exists()
        files = weight_files(pretrained.directory) if is_indexed else [weights.SINGLE_FILE]
        hub.fetch(pretrained.name, pretrained.revision, files)
    return read_weights(pretrained.directory, pretrained.decoder, shardings)


def model_fingerprint(pretrained: Pretrained) -> str:
    """Returns what identifies a model: its commit on the Hub, or a hash of a directory's files.

    The hash covers all JSON files, and size and both ends of each file of weights: hashing all of
    them would take minutes."""
    if pretrained.revision is not None:
        return pretrained.revision

    digest, directory = hashlib.sha256(), pretrained.directory
    for path in sorted(directory.glob("*.safetensors")) + sorted(directory.glob("*.json")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(-1 if path.suffix == ".json" else FINGERPRINT_BYTES))
            if path.suffix != ".json" and size > FINGERPRINT_BYTES:
                file.seek(-FINGERPRINT_BYTES, os.SEEK_END)
                digest.update(file.read())
    return digest.hexdigest()[:12]


def load_tokenizer(directory: Path) -> Any:
    """Loads the directory's own fast tokenizer. Raises: UserError if it cannot be loaded."""
    if not (directory / "tokenizer.json").exists():
        raise UserError(f"{directory}: has no tokenizer.json")
    # No notice that torch is missing: it is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers  # 1.6 s: only when a tokenizer is needed

    try:
        # Not AutoTokenizer: for some model_types its class overrides tokenizer.json's whitespace.
        return transformers.PreTrainedTokenizerFast.from_pretrained(str(directory),
                                                                    local_files_only=True)
    except Exception as error:      # a damaged file may raise anything
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(f"{directory}: tokenizer.json and tokenizer_config.json cannot be loaded "
                        f"by transformers ({reason})") from None


def eos_ids(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """Returns the ids that end a response.

    They are generation_config.json's, or else config.json's, and the tokenizer's own.

    Raises:
        UserError: There is none: a response could never end."""
    configured: list[Any] = []
    for path in (directory / "generation_config.json", directory / "config.json"):
        if path.exists():
            entry = read_json(path).get("eos_token_id")
            configured = entry if isinstance(entry, list) else [] if entry is None else [entry]
            if any(isinstance(eos, bool) or not isinstance(eos, int) or eos < 0
                   for eos in configured):
                raise UserError(f"{path}: eos_token_id must be an id or a list of ids, got "
                                f"{json.dumps(entry)[:60]}")
        if configured:
            break

    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = tuple(sorted({*configured, *own}))
    if not ids:
        raise UserError(f"{directory}: neither generation_config.json nor the tokenizer names an "
                        "EOS token")
    return ids


def unused_ids(tokenizer: Any, vocabulary: int,
               eos_ids: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Returns the ids below `vocabulary` without a token, as ranges [first, end); EOS ids count."""
    is_used = np.zeros(vocabulary, bool)
    is_used[[token for token in tokenizer.get_vocab().values() if token < vocabulary]] = True
    is_used[list(eos_ids)] = True
    edges = np.flatnonzero(np.diff(np.pad(is_used, 1, constant_values=True))).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def export_model(params: Params, config: DecoderConfig, source: Path, target: Path, *,
                 chat_template: str | None = None, card: str | None = None,
                 facts: Mapping[str, Any] | None = None) -> None:
    """Writes a directory that transformers loads: weights in the source's dtypes, and companions.

    The directory appears under its name only when complete: a crash or a full disk leaves the old
    one as it was. A crash between the two renames leaves both, which `hub.existing_export` and the
    next export repair. With several processes all call it.

    Args:
        source: The directory the model came from.
        chat_template: The one it was trained with, instead of the source's.
        card: The text of README.md.
        facts: The table of effreason.json.

    Raises:
        OSError: The directory cannot be written."""
    if not processes.is_primary():      # only passes on its shards of the weights
        write_weights(params, config, stored_dtype(source), None, weights.stored_dtypes(source))
        return

    partial, old = (target.with_name(target.name + suffix) for suffix in (".partial", ".old"))
    if not target.exists() and (interrupted := hub.existing_export(target)):
        interrupted.rename(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name in COMPANIONS:
            if (source / name).exists():
                shutil.copyfile(source / name, partial / name)
        if chat_template is not None:
            _write_template(partial, chat_template)
        if card is not None:
            (partial / CARD_FILE).write_text(card, encoding="utf-8")
        if facts is not None:
            (partial / FACTS_FILE).write_text(_json(facts), encoding="utf-8")
        write_decoder(params, config, read_json(source / "config.json"), stored_dtype(source),
                      partial, weights.stored_dtypes(source))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise

    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def write_decoder(params: Params, config: DecoderConfig, table: dict[str, Any], dtype: str,
                  directory: Path, dtypes: Mapping[str, str] | None = None) -> None:
    """Writes config.json and the weights.

    Args:
        table: The config.json that `config` was read from.
        dtype: Of the tensors that `dtypes` does not name."""
    directory.mkdir(parents=True, exist_ok=True)
    exported = _json(exported_config(table, config, dtype))
    (directory / "config.json").write_text(exported, encoding="utf-8")
    write_weights(params, config, dtype, directory, dtypes)


def _write_template(directory: Path, template: str) -> None:
    """Makes this the directory's only chat template, in every place a reader looks at.

    transformers 5 reads chat_template.jinja first, older versions only the tokenizer's entry."""
    (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    (directory / "chat_template.json").unlink(missing_ok=True)
    path = directory / TOKENIZER_FILE
    if path.exists():
        table = read_json(path) | {"chat_template": template}
        path.write_text(_json(table), encoding="utf-8")


def _json(table: Mapping[str, Any]) -> str:
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"
