"""Hugging Face directories in and out: config.json, safetensors, tokenizer, generation settings.

One table names each weight's Hugging Face tensor; loading and exporting both read it. Hugging Face stores matrices
[out, in], we store [in, out] with heads as an axis of their own; a transpose and a reshape lead from one to the other.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from effreason.errors import UserError
from effreason.lm.attention import Llama3Scaling
from effreason.lm.model import DecoderConfig, Params, abstract_params

SHIPPED_REASONER = Path(__file__).parents[1] / "tiny" / "reasoner"
FAMILIES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Everything beside the weights that another program needs to use the model.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
              "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
              "config.json", "LICENSE")
SHARD_BYTES = 5_000_000_000

LAYER_TENSORS = {
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "output": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
TOP_TENSORS = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
INPUT_AXES = {"output": 2}          # leading axes of our matrix that Hugging Face folds into one input axis; else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Everything a Hugging Face directory says of its model, but the weights."""

    directory: Path
    decoder: DecoderConfig
    tokenizer: Any                  # a transformers fast tokenizer
    eos_ids: tuple[int, ...]
    max_positions: int              # longest sequence the model was made for


def open_pretrained(path: str, *, dtype: str, remat: bool) -> Pretrained:
    """Reads config, tokenizer and EOS ids; "tiny" is the reasoner that ships with the package.

    Raises: UserError that names the file."""
    directory = SHIPPED_REASONER if path == "tiny" else Path(path)
    table = read_json(directory / "config.json")
    decoder = parse_config(table, directory / "config.json", dtype=dtype, remat=remat)
    tokenizer = load_tokenizer(directory)
    if len(tokenizer) > decoder.vocabulary:
        raise UserError(f"{directory}: the tokenizer has {len(tokenizer)} tokens, config.json's vocab_size is "
                        f"{decoder.vocabulary}")
    return Pretrained(directory=directory, decoder=decoder, tokenizer=tokenizer,
                      eos_ids=eos_ids(directory, tokenizer),
                      max_positions=int(table.get("max_position_embeddings") or sys.maxsize))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: UserError naming the file."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: file not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(table).__name__}")
    return table


def read_config(directory: Path, *, dtype: str = "float32", remat: bool = True) -> DecoderConfig:
    """The decoder that a directory's config.json describes."""
    path = directory / "config.json"
    return parse_config(read_json(path), path, dtype=dtype, remat=remat)


def parse_config(table: dict[str, Any], path: Path, *, dtype: str = "float32", remat: bool = True) -> DecoderConfig:
    """The decoder that the table of a config.json describes, in both its old and its new spelling.

    Raises: UserError that names the file and the entry, for an unknown family or a feature this decoder lacks:
        it never computes something other than what the checkpoint means."""

    def entry(name: str, kind: type[int] | type[float] = int, default: Any = None) -> Any:
        value = default if table.get(name) is None else table[name]
        if value is None:
            raise UserError(f"{path}: has no entry {name!r}")
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
            raise UserError(f"{path}: {name} must be a positive {kind.__name__}, got {json.dumps(value)[:60]}")
        return value

    family = table.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{path}: model_type {family!r} is not supported, expected one of {', '.join(FAMILIES)}")
    unsupported = [
        (table.get("hidden_act", "silu") != "silu", "hidden_act"),
        (bool(table.get("use_sliding_window")), "use_sliding_window"),
        ("sliding_attention" in (table.get("layer_types") or []), "layer_types"),
        (family != "qwen2" and bool(table.get("attention_bias")), "attention_bias"),
        (bool(table.get("mlp_bias")), "mlp_bias"),
        (table.get("quantization_config") is not None, "quantization_config"),
        (table.get("pretraining_tp", 1) not in (None, 1), "pretraining_tp"),
    ]
    for present, name in unsupported:
        if present:
            raise UserError(f"{path}: {name} = {json.dumps(table[name])[:60]} is not supported")
    theta, scaling = _rope_entries(path, table)
    heads, width = entry("num_attention_heads"), entry("hidden_size")
    return DecoderConfig(
        vocabulary=entry("vocab_size"), width=width, layers=entry("num_hidden_layers"), heads=heads,
        kv_heads=entry("num_key_value_heads", default=heads), head_dim=entry("head_dim", default=width // heads),
        mlp_width=entry("intermediate_size"), norm_eps=entry("rms_norm_eps", float), rope_theta=theta,
        rope_scaling=scaling, tied=bool(table.get("tie_word_embeddings", False)), qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3", dtype=jnp.dtype(dtype), remat=remat)


def _rope_entries(path: Path, table: dict[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """transformers 5 writes rope_parameters, which holds theta too; older files have rope_theta and rope_scaling."""
    rope = table.get("rope_parameters") or table.get("rope_scaling") or {}
    partial = rope.get("partial_rotary_factor", table.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UserError(f"{path}: partial_rotary_factor = {json.dumps(partial)[:60]} is not supported")
    theta = rope.get("rope_theta", table.get("rope_theta"))
    if not isinstance(theta, (int, float)):
        raise UserError(f"{path}: has neither rope_parameters.rope_theta nor rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise UserError(f"{path}: rope type {kind!r} is not supported, expected default or llama3")
    try:
        return float(theta), Llama3Scaling(
            factor=rope["factor"], low_frequency_factor=rope["low_freq_factor"],
            high_frequency_factor=rope["high_freq_factor"], original_positions=rope["original_max_position_embeddings"])
    except KeyError as error:
        raise UserError(f"{path}: llama3 rope parameters lack {error}") from None


@contextlib.contextmanager
def _open_tensors(directory: Path):
    """Name -> an open safetensors file that holds it."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise UserError(f"{index}: has no table weight_map")
    elif single.exists():
        names = None
    else:
        raise UserError(f"{directory}: has neither model.safetensors nor model.safetensors.index.json")
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for file in sorted(set(names.values())) if names is not None else [single.name]:
            try:
                files[file] = stack.enter_context(safetensors.safe_open(directory / file, framework="numpy"))
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"{directory / file}: cannot be read as safetensors ({error})") from None
        yield {name: files[file] for name, file in names.items()} if names is not None else dict.fromkeys(
            files[single.name].keys(), files[single.name])


def load(directory: Path, config: DecoderConfig, shardings: Params | None = None) -> Params:
    """The weights as float32, stacked over layers, each put onto its sharding before the next is read.

    Args: shardings, a tree like the weights; None leaves them on the default device.
    Raises: UserError for a tensor that is missing or of another shape than config.json says."""
    with _open_tensors(directory) as tensors:

        def read(name: str, shape: tuple[int, ...], inputs: int) -> np.ndarray:
            _stored_kind(directory, tensors, name)
            tensor = tensors[name].get_tensor(name)
            expected = _stored_shape(name, shape, inputs)
            if tensor.shape != expected:
                raise UserError(f"{directory}: tensor {name} has shape {tensor.shape}, config.json expects {expected}")
            return _from_stored(name, tensor, shape)

        def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, target: Any) -> jax.Array:
            *parents, name = (key.key for key in path)
            if not parents:
                value = read(TOP_TENSORS[name], leaf.shape, 1).astype(np.float32)
            else:
                value = np.empty(leaf.shape, np.float32)
                for layer in range(config.layers):
                    value[layer] = read(_layer_name(layer, name), leaf.shape[1:], INPUT_AXES.get(name, 1))
            return jax.device_put(value, target)

        abstract = abstract_params(config)
        if shardings is None:
            return jax.tree_util.tree_map_with_path(lambda path, leaf: place(path, leaf, None), abstract)
        return jax.tree_util.tree_map_with_path(place, abstract, shardings)


def _layer_name(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{LAYER_TENSORS[name]}"


def _is_matrix(name: str) -> bool:
    return name.endswith("proj.weight")


def _stored_shape(name: str, shape: tuple[int, ...], inputs: int) -> tuple[int, ...]:
    if _is_matrix(name):
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])
    return shape if name.endswith(("embed_tokens.weight", "lm_head.weight")) else (math.prod(shape),)


def _from_stored(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return (tensor.T if _is_matrix(name) else tensor).reshape(shape)


def _to_stored(name: str, value: np.ndarray, inputs: int, dtype: Any) -> np.ndarray:
    stored = _stored_shape(name, value.shape, inputs)
    matrix = value.reshape(stored[::-1]).T if _is_matrix(name) else value.reshape(stored)
    return np.ascontiguousarray(matrix.astype(dtype))


def stored_dtype(directory: Path) -> str:
    """The dtype most of the checkpoint's weights are stored in: float32, bfloat16 or float16."""
    with _open_tensors(directory) as tensors:
        return STORED_DTYPES[_stored_kind(directory, tensors, TOP_TENSORS["embedding"])]


def _stored_kind(directory: Path, tensors: dict[str, Any], name: str) -> str:
    """A tensor's dtype, as safetensors spells it. Raises: UserError where it is missing or of another kind."""
    if name not in tensors:
        raise UserError(f"{directory}: has no tensor {name}")
    try:
        kind = tensors[name].get_slice(name).get_dtype()
    except safetensors.SafetensorError as error:        # the index names a file that does not hold it
        raise UserError(f"{directory}: tensor {name} cannot be read ({error})") from None
    if kind not in STORED_DTYPES:
        raise UserError(f"{directory}: tensor {name} is stored as {kind}, expected one of {', '.join(STORED_DTYPES)}")
    return kind


def stored_tensors(params: Params, config: DecoderConfig, dtype: str):
    """Yields (Hugging Face name, array) for all weights, one layer's matrix in host memory at a time."""
    numpy_dtype = jnp.dtype(dtype)
    for name, tensor in TOP_TENSORS.items():
        if name in params:
            yield tensor, _to_stored(tensor, np.asarray(jax.device_get(params[name])), 1, numpy_dtype)
    for layer in range(config.layers):
        for name, stacked in params["layers"].items():
            value = np.asarray(jax.device_get(stacked[layer]))
            full = _layer_name(layer, name)
            yield full, _to_stored(full, value, INPUT_AXES.get(name, 1), numpy_dtype)


def export(params: Params, config: DecoderConfig, source: Path, target: Path) -> None:
    """Writes a directory that `transformers` loads: weights in the source's dtype, and the source's companions.

    The directory appears under its name only when it is whole: a crash or a full disk leaves the old one as it was.
    Args: source, the directory the model came from: config.json, tokenizer, chat template, generation settings."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name in COMPANIONS:
            if (source / name).exists():
                shutil.copyfile(source / name, partial / name)
        write_model(params, config, read_json(source / "config.json"), stored_dtype(source), partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def write_model(params: Params, config: DecoderConfig, table: dict[str, Any], dtype: str, directory: Path) -> None:
    """config.json and the weights in `dtype`; `table` is the config.json that `config` was read from."""
    directory.mkdir(parents=True, exist_ok=True)
    exported = json.dumps(_exported_config(table, config, dtype), indent=2) + "\n"
    (directory / "config.json").write_text(exported)
    _write_shards(stored_tensors(params, config, dtype), directory)


def _write_shards(tensors: Any, directory: Path) -> None:
    """model.safetensors, or shards of at most SHARD_BYTES with an index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    weight_map, total, written, size = {}, 0, 0, 0

    def flush() -> None:
        nonlocal written
        written += 1
        try:
            safetensors.numpy.save_file(shards[-1], directory / f"shard-{written}", metadata={"format": "pt"})
        except safetensors.SafetensorError as error:        # a full disk, told as one
            raise OSError(f"{directory}: the weights cannot be written ({error})") from None
        (directory / f"shard-{written}").chmod(0o644)       # safetensors makes files for their owner alone
        for name in shards[-1]:
            weight_map[name] = written
        shards[-1] = {}

    for name, tensor in tensors:
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if written == 1:
        (directory / "shard-1").rename(directory / "model.safetensors")
        return
    names = {shard: f"model-{shard:05d}-of-{written:05d}.safetensors" for shard in range(1, written + 1)}
    for shard, name in names.items():
        (directory / f"shard-{shard}").rename(directory / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[at] for name, at in weight_map.items()}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _exported_config(table: dict[str, Any], config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The source's config.json, with dtype and rotary settings in the old and in the new spelling."""
    table = table | {"dtype": dtype, "torch_dtype": dtype}
    table["architectures"] = [FAMILIES[table["model_type"]]]
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = dataclasses.astuple(config.rope_scaling)
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope = {"rope_type": "llama3"} | dict(zip(names, scaling, strict=True))
        table["rope_scaling"] = rope
    return table | {"rope_theta": config.rope_theta, "rope_parameters": rope | {"rope_theta": config.rope_theta}}


def load_tokenizer(directory: Path) -> Any:
    """The directory's own fast tokenizer. Raises: UserError where there is none, or no chat template."""
    # No notice that torch is missing: it is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers  # 1.6 s: only when a tokenizer is needed

    try:
        # Not AutoTokenizer: by the model_type it may take a class that replaces what tokenizer.json says of whitespace.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{directory}: has no tokenizer that transformers can load ({reason})") from None
    if not tokenizer.chat_template:
        raise UserError(f"{directory}: the tokenizer has no chat template")
    return tokenizer


def eos_ids(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a response: generation_config.json's, and the tokenizer's own.

    Raises: UserError where neither names one: a response could then never end."""
    path = directory / "generation_config.json"
    named = read_json(path).get("eos_token_id") if path.exists() else None
    named = [named] if isinstance(named, int) else list(named or [])
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = tuple(sorted(set(named + own)))
    if not ids:
        raise UserError(f"{directory}: neither generation_config.json nor the tokenizer names an EOS token")
    return ids
