"""Reads Hugging Face models, from a directory or the Hub, and exports them to a directory."""

import codecs
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effreason.lm import adapters
from effreason.lm.architecture import DecoderConfig
from effreason.lm.hf import hub, peft, weights
from effreason.lm.hf.config import (
    decoder_table,
    exported_config,
    max_positions,
    parse_config,
    transformers,
)
from effreason.lm.hf.weights import read_weights, stored_dtype, weight_files, write_weights
from effreason.lm.model import Params
from effreason.runtime import processes, sharding
from effreason.runtime.errors import UserError
from effreason.runtime.files import check_present, read_json
from effreason.runtime.sharding import Shardings

SHIPPED_REASONER = Path(__file__).parents[2] / "data" / "tiny" / "reasoner"
TEMPLATE_FILE, TOKENIZER_FILE = "chat_template.jinja", "tokenizer_config.json"
OLDER_TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.json", "additional_chat_templates"
GENERATION_FILE = "generation_config.json"
CARD_FILE, FACTS_FILE = "README.md", "effreason.json"
# What another program needs besides the weights. The source's README is not ours to pass on.
COMPANIONS = ("config.json", "tokenizer.json", TOKENIZER_FILE, "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", TEMPLATE_FILE,
              OLDER_TEMPLATE_FILE, GENERATION_FILE, "preprocessor_config.json",
              "processor_config.json", "video_preprocessor_config.json", "LICENSE", "LICENSE.md",
              "LICENSE.txt", "NOTICE", "USE_POLICY.md")
SLOW_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
CONVERT_TOKENIZER = ("load it with AutoTokenizer of transformers, and save_pretrained writes "
                     "tokenizer.json")
FINGERPRINT_BYTES = 2**20           # read from each end of a file of weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Everything a model's files say about it, without the weights."""

    name: str                       # as the user named it: "tiny", a directory or a Hub id
    base: str                       # the same; of adapters, the model that they are for
    revision: str | None            # the commit of a base on the Hub; None for a directory
    directory: Path                 # of the base; if it is on the Hub, its snapshot in the cache
    adapters: peft.StoredAdapters | None    # to be added to the base's weights
    decoder: DecoderConfig
    tokenizer: Any                  # a transformers fast tokenizer
    eos_ids: tuple[int, ...]        # that end a response; with those of rollout.stop_ids
    max_positions: int              # longest sequence the model was trained for
    notes: tuple[str, ...]          # lines for the log: what in its files may surprise

    @property
    def own_directory(self) -> Path:
        """The directory with what is the model's own besides weights, such as facts of training."""
        return self.directory if self.adapters is None else self.adapters.directory


def open_pretrained(path: str, *, dtype: str, remat: str = "full",
                    revision: str | None = None, stop_ids: str | None = None,
                    adapter: str | None = None, positions: int | None = None) -> Pretrained:
    """Reads config, tokenizer and EOS ids, and checks that there are weights that fit.

    Args:
        path: A directory, the id of a model on the Hub, whose small files are fetched, or "tiny",
            the reasoner that ships with the package. A directory of adapters in the format of peft
            is the model they are for, with them.
        revision: A branch, tag or commit on the Hub.
        adapter: A directory of adapters for the model.
        stop_ids: More tokens that end a response, see `parse_stop_ids`.
        positions: The longest sequence that will be computed, see `parse_config`.

    Raises:
        UserError: Names the file, or says how to get the model."""
    base, revision, adapter = peft.resolve(path, revision, adapter)
    if base == "tiny" and revision is not None:
        raise UserError("model.revision is for a model on the Hub, model.path is tiny, got "
                        f"{revision}")
    try:
        directory, commit = hub.find(str(SHIPPED_REASONER) if base == "tiny" else base, revision, (
            *COMPANIONS, CARD_FILE, FACTS_FILE, weights.INDEX_FILE, hub.ADAPTER_FILE,
            f"{TEMPLATE_FOLDER}/*.jinja"))
    except UserError as error:
        of_adapter = f"{path}: holds an adapter, whose base cannot be opened; " * (path != base)
        raise UserError(f"{of_adapter}{error}") from None
    for file in (*COMPANIONS, FACTS_FILE):
        if os.path.lexists(directory / file):
            check_present(directory / file)
    config_file = directory / "config.json"
    table = read_json(config_file)
    decoder = parse_config(table, config_file, dtype=dtype, remat=remat, positions=positions)
    if commit is None:
        weights.check_weights(directory, decoder)
    stored = None if adapter is None else peft.open_adapter(Path(adapter), decoder)

    # Adapters may have a tokenizer of their own, such as one with another chat template.
    own = directory if adapter is None else Path(adapter)
    tokenizer = load_tokenizer(own if (own / "tokenizer.json").exists() else directory)
    ids = eos_ids(directory, tokenizer, own)
    usable = tuple(eos for eos in ids if eos < decoder.vocabulary)
    if not usable:
        raise UserError(f"{directory}: eos_token_id must be below config.json's vocab_size, "
                        f"{decoder.vocabulary}, got {max(ids)}")
    if stop_ids is not None:
        usable = tuple(sorted({*usable, *parse_stop_ids(stop_ids, tokenizer, decoder.vocabulary)}))
    decoder = dataclasses.replace(
        decoder, unused_ids=unused_ids(tokenizer, decoder.vocabulary, usable))
    return Pretrained(name=adapter or path, base=base, revision=commit, directory=directory,
                      adapters=stored, decoder=decoder, tokenizer=tokenizer, eos_ids=usable,
                      max_positions=max_positions(table, config_file), notes=tuple(
                          _notes(directory, table, decoder.vocabulary, len(tokenizer), ids)))


def _notes(directory: Path, table: dict[str, Any], rows: int, tokens: int,
           ids: Sequence[int]) -> Iterator[str]:
    """Yields what is in a model's files that is not used, or not as one might think.

    Args: rows, the model's vocabulary; tokens, the tokenizer's."""
    if tokens > rows:
        yield (f"{directory}: the tokenizer has {tokens:,} tokens, the model only {rows:,} "
               "(vocab_size); a prompt with one of the others is an error")
    if beyond := [eos for eos in ids if eos >= rows]:
        yield (f"{directory}: EOS {', '.join(map(str, beyond))} can never be sampled, vocab_size "
               f"is {rows:,}; the others end a response")
    if (directory / weights.SINGLE_FILE).exists() and (directory / weights.INDEX_FILE).exists():
        yield (f"{directory}: has {weights.SINGLE_FILE} and {weights.INDEX_FILE}; the single file "
               "is read, as transformers does, not the shards of the index")
    if table.get("auto_map"):
        yield (f"{directory}: config.json names code of its own (auto_map), which is not run; the "
               f"weights are read as {table['model_type']}")


def load_weights(pretrained: Pretrained, shardings: Shardings | None = None, *,
                 merged: bool = True) -> Params:
    """Returns the weights of a model as `read_weights` does; fetches them if it is on the Hub.

    Args:
        shardings: See `read_weights`.
        merged: With the model's adapters, if it has any, added to them.

    Raises:
        UserError: They cannot be fetched, or do not fit the model's config.json."""
    if pretrained.revision is not None:
        is_indexed = (pretrained.directory / weights.INDEX_FILE).exists()
        files = weight_files(pretrained.directory) if is_indexed else [weights.SINGLE_FILE]
        hub.fetch(pretrained.base, pretrained.revision, files)
    params = read_weights(pretrained.directory, pretrained.decoder, shardings)
    if pretrained.adapters is None or not merged:
        return params

    config, stored = peft.read_adapter(pretrained.adapters.directory, pretrained.decoder)
    adapter = config.adapter
    assert adapter is not None
    if shardings is not None:       # whole on every device: they are small
        stored = sharding.to_device(stored, sharding.sharding(shardings["final_norm"].mesh))

    def merge(params: Params, stored: Params) -> Params:
        return adapters.merge(adapter, adapters.join(params, stored))

    return jax.jit(merge, out_shardings=shardings, donate_argnums=0)(params, stored)


def model_fingerprint(pretrained: Pretrained) -> str:
    """Returns what identifies a model: its commit on the Hub, or a hash of a directory's files."""
    base = pretrained.revision or _fingerprint(pretrained.directory)
    if pretrained.adapters is None:
        return base
    return f"{base}+{_fingerprint(pretrained.adapters.directory)}"


def _fingerprint(directory: Path) -> str:
    """Returns a hash of all JSON files, and of size and both ends of each file of weights: hashing
    all of them would take minutes."""
    digest = hashlib.sha256()
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
        others = [name for name in SLOW_TOKENIZERS if (directory / name).exists()]
        hint = f", only {others[0]}; {CONVERT_TOKENIZER}" if others else ""
        raise UserError(f"{directory}: has no tokenizer.json{hint}")

    with tempfile.TemporaryDirectory() as copy:
        _copy_companions(directory, Path(copy))
        try:
            # Not AutoTokenizer: for some model_types its class overrides tokenizer.json's
            # whitespace.
            tokenizer = transformers().PreTrainedTokenizerFast.from_pretrained(
                copy, local_files_only=True)
        except Exception as error:      # a damaged file may raise anything
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise UserError(f"{directory}: tokenizer.json and tokenizer_config.json cannot be "
                            f"loaded by transformers ({reason})") from None

    older = directory / OLDER_TEMPLATE_FILE
    if tokenizer.chat_template is None and older.exists():
        text = read_json(older).get("chat_template")
        tokenizer.chat_template = text if isinstance(text, str) else None
    return tokenizer


def _copy_companions(source: Path, target: Path) -> None:
    """Copies the small files of a model, without the byte-order marks that some editors write."""
    named = [f"{TEMPLATE_FOLDER}/{path.name}" for path in source.glob(f"{TEMPLATE_FOLDER}/*.jinja")]
    for name in (*COMPANIONS, *named):
        if (source / name).exists():
            (target / name).parent.mkdir(exist_ok=True)
            content = (source / name).read_bytes()
            (target / name).write_bytes(content.removeprefix(codecs.BOM_UTF8))


def eos_ids(directory: Path, tokenizer: Any, own: Path | None = None) -> tuple[int, ...]:
    """Returns the ids that end a response.

    They are generation_config.json's, or else config.json's, and the tokenizer's own.

    Args:
        own: A directory whose generation_config.json, if it has one, goes before the model's.

    Raises:
        UserError: There is none: a response could never end."""
    configured: list[Any] = []
    for path in ((own or directory) / GENERATION_FILE, directory / GENERATION_FILE,
                 directory / "config.json"):
        if path.exists():
            table = read_json(path)
            entry = table.get("eos_token_id")
            if entry is None:
                entry = decoder_table(table, path).get("eos_token_id")
            configured = entry if isinstance(entry, list) else [] if entry is None else [entry]
            if any(isinstance(eos, bool) or not isinstance(eos, int) or eos < 0
                   for eos in configured):
                raise UserError(f"{path}: eos_token_id must be an id or a list of ids, got "
                                f"{json.dumps(entry)[:60]}")
        if configured:
            break

    of_tokenizer = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = tuple(sorted({*configured, *of_tokenizer}))
    if not ids:
        raise UserError(f"{directory}: neither generation_config.json nor the tokenizer names an "
                        "EOS token")
    return ids


def parse_stop_ids(text: str, tokenizer: Any, vocabulary: int) -> list[int]:
    """Returns the ids in a list of ids and texts of single tokens, separated by commas.

    Raises:
        UserError: One of them is neither."""
    ids, known = [], tokenizer.get_vocab()
    for part in (part.strip() for part in text.split(",")):
        if part.isdecimal():
            found = [int(part)]
        else:
            found = ([known[part]] if part in known
                     else tokenizer.encode(part, add_special_tokens=False))
        if len(found) != 1 or found[0] >= vocabulary or found[0] == tokenizer.unk_token_id:
            raise UserError(f"rollout.stop_ids must be ids below {vocabulary} or texts of single "
                            f"tokens, separated by commas, got {part!r}")
        ids += found
    return ids


def unused_ids(tokenizer: Any, vocabulary: int,
               eos_ids: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Returns the ids below `vocabulary` without a token, as ranges [first, end); EOS ids count."""
    is_used = np.zeros(vocabulary, bool)
    is_used[[token for token in tokenizer.get_vocab().values() if token < vocabulary]] = True
    is_used[list(eos_ids)] = True
    edges = np.flatnonzero(np.diff(np.pad(is_used, 1, constant_values=True))).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def beside(target: Path) -> tuple[Path, Path]:
    """Returns the directories of an export in progress, and of the one that it replaces."""
    return target.with_name(target.name + ".partial"), target.with_name(target.name + ".old")


def recover_export(target: Path) -> None:
    """Completes or removes what an export left that was cut off between two renames or before."""
    if not target.exists() and (interrupted := hub.existing_export(target)):
        interrupted.rename(target)
    for left in beside(target):
        shutil.rmtree(left, ignore_errors=True)


def export_model(params: Params, config: DecoderConfig, source: Path, target: Path, *,
                 own: Path | None = None, chat_template: str | None = None,
                 card: str | None = None, facts: Mapping[str, Any] | None = None,
                 eos_ids: Sequence[int] = (), base: tuple[str, str | None] | None = None) -> None:
    """Writes a directory that transformers loads: weights in the source's dtypes, and companions.

    With adapters in `config` it holds these alone instead of weights, as peft writes them.

    The directory appears under its name only when complete: a crash or a full disk leaves the old
    one as it was. A crash between the two renames leaves both, which `hub.existing_export` and the
    next export repair. With several processes all call it.

    Args:
        source: The directory the model came from.
        own: Another one, whose tokenizer goes before the source's.
        chat_template: The one it was trained with, instead of the source's.
        card: The text of README.md.
        facts: The table of effreason.json.
        eos_ids: Those it was trained with, for generation_config.json.
        base: What adapters name as their model, and its revision; None = the source.

    Raises:
        OSError: The directory cannot be written."""
    write = functools.partial(_write_policy, params, config, source,
                              base or (str(source.absolute()), None))
    if not processes.is_primary():      # only passes on its shards of the weights
        write(None)
        return

    recover_export(target)
    partial, old = beside(target)
    partial.mkdir(parents=True)
    try:
        for directory in (source, own or source):
            _copy_companions(directory, partial)
        if chat_template is not None:
            _write_template(partial, chat_template)
        _write_eos(partial, eos_ids)
        if card is not None:
            (partial / CARD_FILE).write_text(card, encoding="utf-8")
        if facts is not None:
            (partial / FACTS_FILE).write_text(_json(facts), encoding="utf-8")
        write(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise

    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _write_policy(params: Params, config: DecoderConfig, source: Path,
                  base: tuple[str, str | None], directory: Path | None) -> None:
    """Writes weights with config.json, or adapters alone. Args: directory, None if another process
    writes."""
    if config.adapter is not None:
        if directory is not None:       # it would say that there is a whole model
            (directory / "config.json").unlink()
        peft.write_adapter(params, config, directory, base_model=base[0], revision=base[1])
        return

    dtype = stored_dtype(source)
    if directory is None:
        write_weights(params, config, dtype, None, source)
    else:
        write_decoder(params, config, read_json(source / "config.json"), dtype, directory, source)


def write_decoder(params: Params, config: DecoderConfig, table: dict[str, Any], dtype: str,
                  directory: Path, source: Path | None = None) -> None:
    """Writes config.json and the weights.

    Args:
        table: The config.json that `config` was read from.
        dtype, source: See `write_weights`."""
    directory.mkdir(parents=True, exist_ok=True)
    exported = _json(exported_config(table, config, dtype))
    (directory / "config.json").write_text(exported, encoding="utf-8")
    write_weights(params, config, dtype, directory, source)


def _write_template(directory: Path, template: str) -> None:
    """Makes this the directory's only chat template, in every place a reader looks at.

    transformers 5 reads chat_template.jinja first, older versions only the tokenizer's entry."""
    (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    (directory / OLDER_TEMPLATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(directory / TEMPLATE_FOLDER, ignore_errors=True)
    path = directory / TOKENIZER_FILE
    if path.exists():
        table = read_json(path) | {"chat_template": template}
        path.write_text(_json(table), encoding="utf-8")


def _write_eos(directory: Path, eos_ids: Sequence[int]) -> None:
    """Makes other programs end a response at the same tokens, unless they would anyway."""
    path, config_file = directory / GENERATION_FILE, directory / "config.json"
    config = decoder_table(read_json(config_file), config_file)
    table = read_json(path) if path.exists() else {
        name: config[name] for name in ("bos_token_id", "pad_token_id")
        if config.get(name) is not None}
    entry = table.get("eos_token_id", config.get("eos_token_id"))
    if not set(eos_ids) <= set(entry if isinstance(entry, list) else [entry]):
        path.write_text(_json(table | {"eos_token_id": list(eos_ids)}), encoding="utf-8")


def _json(table: Mapping[str, Any]) -> str:
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"
