"""Hugging Face models in and out: what a directory or a Hub repository says of a model, and the directory we export."""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effreason.lm.hf import hub, weights
from effreason.lm.hf.config import exported_config, parse_config, read_json
from effreason.lm.hf.weights import read_weights, stored_dtype, weight_files, write_weights
from effreason.lm.model import DecoderConfig, Params
from effreason.runtime import processes
from effreason.runtime.errors import UserError

SHIPPED_REASONER = Path(__file__).parents[2] / "data" / "tiny" / "reasoner"
TEMPLATE_FILE, TOKENIZER_FILE, CARD_FILE, FACTS_FILE = (
    "chat_template.jinja", "tokenizer_config.json", "README.md", "effreason.json")
# Everything beside the weights that another program needs to use the model; its README is not ours to pass on.
COMPANIONS = ("config.json", "tokenizer.json", TOKENIZER_FILE, "special_tokens_map.json", "added_tokens.json",
              "vocab.json", "merges.txt", "tokenizer.model", TEMPLATE_FILE, "chat_template.json",
              "generation_config.json", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
FINGERPRINT_BYTES = 2**20           # read from each end of a file of weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Everything a model's files say of it, but the weights."""

    name: str                       # as the user named it: "tiny", a directory or a Hub id
    revision: str | None            # the commit of a model on the Hub; None for a directory
    directory: Path                 # of a model on the Hub, its snapshot in the cache
    decoder: DecoderConfig
    tokenizer: Any                  # a transformers fast tokenizer
    eos_ids: tuple[int, ...]
    max_positions: int              # longest sequence the model was made for


def open_pretrained(path: str, *, dtype: str, remat: str = "full", revision: str | None = None) -> Pretrained:
    """Reads config, tokenizer and EOS ids, and sees that there are weights.

    Args: path, a directory, the id of a model on the Hub, whose small files are fetched, or "tiny", the reasoner that
        ships with the package; revision, a branch, tag or commit on the Hub.
    Raises: UserError that names the file, or says how to get the model."""
    if path == "tiny" and revision is not None:
        raise UserError(f"model.revision is for a model on the Hub, model.path is tiny, got {revision}")
    name = str(SHIPPED_REASONER) if path == "tiny" else path
    directory, commit = hub.find(name, revision, (*COMPANIONS, FACTS_FILE, weights.INDEX_FILE))
    table = read_json(directory / "config.json")
    decoder = parse_config(table, directory / "config.json", dtype=dtype, remat=remat)
    if commit is None:
        weight_files(directory)
    tokenizer = load_tokenizer(directory)
    if len(tokenizer) > decoder.vocabulary:
        raise UserError(f"{directory}: the tokenizer has {len(tokenizer)} tokens, config.json's vocab_size is "
                        f"{decoder.vocabulary}")
    positions, ends = table.get("max_position_embeddings"), eos_ids(directory, tokenizer)
    if max(ends) >= decoder.vocabulary:
        raise UserError(f"{directory}: eos_token_id must be below config.json's vocab_size, {decoder.vocabulary}, got "
                        f"{max(ends)}")
    return Pretrained(name=path, revision=commit, directory=directory, decoder=decoder, tokenizer=tokenizer,
                      eos_ids=ends,
                      max_positions=positions if isinstance(positions, int) and positions > 0 else sys.maxsize)


def load_weights(pretrained: Pretrained, shardings: Params | None = None) -> Params:
    """The weights of an opened model as `read_weights` gives them; those of a model on the Hub are fetched now.

    Raises: UserError."""
    if pretrained.revision is not None:
        indexed = (pretrained.directory / weights.INDEX_FILE).exists()
        wanted = weight_files(pretrained.directory) if indexed else [weights.SINGLE_FILE]
        hub.fetch(pretrained.name, pretrained.revision, wanted)
    return read_weights(pretrained.directory, pretrained.decoder, shardings)


def model_fingerprint(pretrained: Pretrained) -> str:
    """The commit of a model on the Hub; of a directory a hash of its JSON files, and of both ends and the size of each
    file of weights: all of them would take minutes."""
    if pretrained.revision is not None:
        return pretrained.revision
    digest = hashlib.sha256()
    for path in sorted(pretrained.directory.glob("*.safetensors")) + sorted(pretrained.directory.glob("*.json")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(-1 if path.suffix == ".json" else FINGERPRINT_BYTES))
            if path.suffix != ".json" and size > FINGERPRINT_BYTES:
                file.seek(-FINGERPRINT_BYTES, os.SEEK_END)
                digest.update(file.read())
    return digest.hexdigest()[:12]


def load_tokenizer(directory: Path) -> Any:
    """The directory's own fast tokenizer. Raises: UserError where there is none that can be read."""
    if not (directory / "tokenizer.json").exists():
        raise UserError(f"{directory}: has no tokenizer.json")
    # No notice that torch is missing: it is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers  # 1.6 s: only when a tokenizer is needed

    try:
        # Not AutoTokenizer: by the model_type it may take a class that replaces what tokenizer.json says of whitespace.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # a damaged file meets every kind of them
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(f"{directory}: tokenizer.json and tokenizer_config.json cannot be loaded by transformers "
                        f"({reason})") from None
    return tokenizer


def eos_ids(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a response: generation_config.json's, or else config.json's, and the tokenizer's own.

    Raises: UserError where none names one: a response could then never end."""
    named: list[Any] = []
    for path in (directory / "generation_config.json", directory / "config.json"):
        if path.exists():
            entry = read_json(path).get("eos_token_id")
            named = entry if isinstance(entry, list) else [] if entry is None else [entry]
            if any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in named):
                raise UserError(f"{path}: eos_token_id must be an id or a list of ids, got {json.dumps(entry)[:60]}")
        if named:
            break
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = tuple(sorted({*named, *own}))
    if not ids:
        raise UserError(f"{directory}: neither generation_config.json nor the tokenizer names an EOS token")
    return ids


def export_model(params: Params, config: DecoderConfig, source: Path, target: Path, *, chat_template: str | None = None,
           card: str | None = None, facts: Mapping[str, Any] | None = None) -> None:
    """Writes a directory that `transformers` loads: weights in the source's dtypes, and the source's companions.

    The directory appears under its name only when it is whole: a crash or a full disk leaves the old one as it was,
    and a crash between the two renames leaves both, which `hub.standing` and the next export set right.
    Args: source, the directory the model came from; chat_template, the one it was trained with, in place of the
        source's; card, the text of README.md; facts, the table of effreason.json.
    Raises: OSError."""
    if not processes.is_primary():       # its part is to hand over its shards of the weights
        write_weights(params, config, stored_dtype(source), None, weights.stored_dtypes(source))
        return
    partial, old = (target.with_name(target.name + suffix) for suffix in (".partial", ".old"))
    if not target.exists() and (survivor := hub.standing(target)):
        survivor.rename(target)
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
        write_decoder(params, config, read_json(source / "config.json"), stored_dtype(source), partial,
                    weights.stored_dtypes(source))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def write_decoder(params: Params, config: DecoderConfig, table: dict[str, Any], dtype: str, directory: Path,
                dtypes: Mapping[str, str] | None = None) -> None:
    """config.json and the weights in `dtype`, those that `dtypes` names in another.

    Args: table, the config.json that `config` was read from."""
    directory.mkdir(parents=True, exist_ok=True)
    exported = _json(exported_config(table, config, dtype))
    (directory / "config.json").write_text(exported, encoding="utf-8")
    write_weights(params, config, dtype, directory, dtypes)


def _write_template(directory: Path, template: str) -> None:
    """The one chat template of a directory, wherever a reader looks for it.

    transformers 5 reads chat_template.jinja before the tokenizer's own entry, older versions the entry alone."""
    (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    (directory / "chat_template.json").unlink(missing_ok=True)
    path = directory / TOKENIZER_FILE
    if path.exists():
        path.write_text(_json(read_json(path) | {"chat_template": template}), encoding="utf-8")


def _json(table: Mapping[str, Any]) -> str:
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"
