"""Weights in and out of safetensors files.

One table says where each weight stands in the files and how it lies there: Hugging Face stores matrices [out, in] and
folds the heads into one axis, we store [in, out] with heads as an axis of their own, and layers stacked on a leading
one. Loading and exporting both read the table. Either way the host holds one tensor beside what the devices hold.
"""

import collections
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from effreason.lm.hf.config import read_json
from effreason.lm.model import DecoderConfig, Params, abstract_params
from effreason.runtime import sharding
from effreason.runtime.errors import UserError

Values = Callable[[], Any]          # gives one tensor's values

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SHARD_BYTES = 5_000_000_000

# Ours -> the name in the files, and for each axis there, which of our axes it folds together, in order.
TABLE, VECTOR, MATRIX = ((0,), (1,)), ((0,),), ((1,), (0,))
HEADS_OUT, HEADS_IN, HEAD_BIAS = ((1, 2), (0,)), ((2,), (0, 1)), ((0, 1),)
TOP_TENSORS = {
    "embedding": ("model.embed_tokens.weight", TABLE),
    "final_norm": ("model.norm.weight", VECTOR),
    "head": ("lm_head.weight", TABLE),
}
LAYER_TENSORS = {
    "attention_norm": ("input_layernorm.weight", VECTOR),
    "query": ("self_attn.q_proj.weight", HEADS_OUT),
    "key": ("self_attn.k_proj.weight", HEADS_OUT),
    "value": ("self_attn.v_proj.weight", HEADS_OUT),
    "query_bias": ("self_attn.q_proj.bias", HEAD_BIAS),
    "key_bias": ("self_attn.k_proj.bias", HEAD_BIAS),
    "value_bias": ("self_attn.v_proj.bias", HEAD_BIAS),
    "query_norm": ("self_attn.q_norm.weight", VECTOR),
    "key_norm": ("self_attn.k_norm.weight", VECTOR),
    "output": ("self_attn.o_proj.weight", HEADS_IN),
    "mlp_norm": ("post_attention_layernorm.weight", VECTOR),
    "gate": ("mlp.gate_proj.weight", MATRIX),
    "up": ("mlp.up_proj.weight", MATRIX),
    "down": ("mlp.down_proj.weight", MATRIX),
}
EMBEDDING, HEAD = TOP_TENSORS["embedding"][0], TOP_TENSORS["head"][0]
# Buffers that older exports hold beside the weights: both follow from config.json.
BUFFERS = (".rotary_emb.inv_freq", ".self_attn.bias", ".self_attn.masked_bias")


@dataclasses.dataclass(frozen=True)
class Layout:
    """One tensor of the files: its name, the shape it has with us, and which of our axes each of its axes folds."""

    name: str
    shape: tuple[int, ...]
    folds: tuple[tuple[int, ...], ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[axis] for axis in fold) for fold in self.folds)

    @property
    def order(self) -> tuple[int, ...]:
        return tuple(axis for fold in self.folds for axis in fold)


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor is, and what its file says of it."""

    file: Path
    kind: str                       # F32, BF16, ...
    shape: tuple[int, ...]


def layouts(config: DecoderConfig) -> Params:
    """The tree of the weights, with the layout of each: of one tensor, or a tuple with one for each layer."""
    abstract = abstract_params(config)
    layers = {name: tuple(Layout(f"model.layers.{layer}.{LAYER_TENSORS[name][0]}", leaf.shape[1:],
                                 LAYER_TENSORS[name][1]) for layer in range(config.layers))
              for name, leaf in abstract["layers"].items()}
    top = {name: Layout(TOP_TENSORS[name][0], leaf.shape, TOP_TENSORS[name][1])
           for name, leaf in abstract.items() if name != "layers"}
    return top | {"layers": layers}


# In


def weight_files(directory: Path) -> list[str]:
    """The names of the files that hold the weights. Raises: UserError where there are none."""
    index = directory / INDEX_FILE
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{index}: has no table weight_map")
        for name in names.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{index}: weight_map must name files beside it, got {json.dumps(name)[:60]}")
        return sorted(set(names.values()))
    if (directory / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    pickled = any(directory.glob("*.bin"))
    raise UserError(f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}" + (
        ", only weights pickled by PyTorch; convert them by save_pretrained of transformers" if pickled else ""))


def read_weights(directory: Path, config: DecoderConfig, shardings: Params | None = None) -> Params:
    """The weights as float32, stacked over layers, each shard read by itself and put onto its devices before the next.

    Args: shardings, a tree like the weights; None leaves them on the default device.
    Raises: UserError for a tensor that is missing, or of another shape than config.json says, or that this decoder
        has no use for: the checkpoint would mean something else."""
    stored, table = _headers(directory), layouts(config)
    _check(directory, config, table, stored)

    def place(table: Params, targets: Params | None) -> Params:
        each = {name: None if targets is None else targets[name] for name in table}
        return {name: place(parts, each[name]) if isinstance(parts, dict) else _place(stored, parts, each[name])
                for name, parts in table.items()}

    return place(table, shardings)


def _place(stored: dict[str, Stored], parts: Layout | tuple[Layout, ...], target: Any) -> jax.Array:
    """One of our weights on its devices. A shard that several devices hold is read once."""
    shape = (len(parts), *parts[0].shape) if isinstance(parts, tuple) else parts.shape
    if target is None:
        return jax.device_put(_read(stored, parts, tuple(slice(0, size) for size in shape)))
    holders = collections.defaultdict(list)
    for device, index in target.addressable_devices_indices_map(shape).items():
        bounds = tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))
        holders[bounds].append(device)
    arrays = []
    for bounds, devices in holders.items():
        value = _read(stored, parts, tuple(slice(*each) for each in bounds))
        # Waiting keeps one shard at a time on the host, where the copy to a device runs in the background.
        arrays += jax.block_until_ready([jax.device_put(value, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, target, arrays)


def _read(stored: dict[str, Stored], parts: Layout | tuple[Layout, ...], index: tuple[slice, ...]) -> np.ndarray:
    """float32 values of one shard of a weight."""
    value = _aligned(tuple(each.stop - each.start for each in index))
    if isinstance(parts, Layout):
        value[...] = _read_part(stored[parts.name].file, parts, index)
        return value
    for row, part in enumerate(parts[index[0]]):
        value[row] = _read_part(stored[part.name].file, part, index[1:])
    return value


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Empty float32[shape] on a boundary of 64 bytes: the CPU backend takes such an array without a copy."""
    size = math.prod(shape)
    buffer = np.empty(size + 16, np.float32)
    start = -buffer.ctypes.data % 64 // 4
    return buffer[start : start + size].reshape(shape)


def _read_part(file: Path, layout: Layout, index: tuple[slice, ...]) -> np.ndarray:
    """One tensor's slice, in our axes and the stored dtype.

    The file gives the range of each fold's leading axis, as one block; the axes behind it are cut here."""
    leading = [fold[0] for fold in layout.folds]
    inner = [math.prod(layout.shape[axis] for axis in fold[1:]) for fold in layout.folds]
    block = tuple(slice(index[axis].start * size, index[axis].stop * size)
                  for axis, size in zip(leading, inner, strict=True))
    # Opened for each tensor: the pages that were read would count as ours for as long as the file is open.
    with safetensors.safe_open(file, framework="numpy") as opened:
        part = opened.get_slice(layout.name)[block]
    part = part.reshape([index[axis].stop - index[axis].start if axis in leading else layout.shape[axis]
                         for axis in layout.order])
    part = part[tuple(slice(None) if axis in leading else index[axis] for axis in layout.order)]
    return part.transpose(np.argsort(layout.order))


def _headers(directory: Path) -> dict[str, Stored]:
    """What the headers of the files say of every tensor. The index names the files, the files their tensors."""
    stored: dict[str, Stored] = {}
    for name in weight_files(directory):
        file = directory / name
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                for tensor in opened.keys():
                    header = opened.get_slice(tensor)
                    if tensor in stored:
                        raise UserError(f"{directory}: tensor {tensor} is in {stored[tensor].file.name} and in {name}")
                    stored[tensor] = Stored(file, header.get_dtype(), tuple(header.get_shape()))
        except (OSError, safetensors.SafetensorError) as error:
            reason = "the file is not there" if isinstance(error, FileNotFoundError) else error
            raise UserError(f"{file}: cannot be read as safetensors ({reason})") from None
    return stored


def _check(directory: Path, config: DecoderConfig, table: Params, stored: dict[str, Stored]) -> None:
    """Raises UserError unless the files hold the tensors of the table, and no other."""
    expected: list[Layout] = jax.tree.leaves(table)
    for layout in expected:
        if layout.name not in stored:
            why = "; config.json's tie_word_embeddings is not true" if layout.name == HEAD else ""
            raise UserError(f"{directory}: has no tensor {layout.name}{why}")
        found = stored[layout.name]
        _check_kind(directory, layout.name, found)
        if found.shape != layout.stored_shape:
            rows = layout.folds == TABLE and found.shape[1:] == layout.stored_shape[1:]
            raise UserError(f"{directory}: tensor {layout.name} has " + (
                f"{found.shape[0]} rows, config.json's vocab_size is {config.vocabulary}" if rows else
                f"shape {found.shape}, config.json expects {layout.stored_shape}"))
    unread = sorted(name for name in stored.keys() - {each.name for each in expected} if not name.endswith(BUFFERS))
    if config.tied and HEAD in unread:
        unread.remove(HEAD)
        _check_tied(directory, stored)
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        raise UserError(f"{directory}: holds tensor {unread[0]}{more}, which the decoder that config.json describes "
                        "does not have")


def _check_kind(directory: Path, name: str, found: Stored) -> None:
    if found.kind not in STORED_DTYPES:
        raise UserError(f"{directory}: tensor {name} is stored as {found.kind}, expected one of "
                        f"{', '.join(STORED_DTYPES)}")


def _check_tied(directory: Path, stored: dict[str, Stored]) -> None:
    """Raises UserError where a head that config.json calls tied is not the embedding: transformers would use it."""
    head, embedding = stored[HEAD], stored[EMBEDDING]
    same = head.kind == embedding.kind and head.shape == embedding.shape
    with safetensors.safe_open(head.file, "numpy") as one, safetensors.safe_open(embedding.file, "numpy") as other:
        ours, theirs = one.get_slice(HEAD), other.get_slice(EMBEDDING)
        for start in range(0, head.shape[0] if same else 0, 4096):
            rows = slice(start, min(start + 4096, head.shape[0]))
            same = same and ours[rows].tobytes() == theirs[rows].tobytes()
    if not same:
        raise UserError(f"{directory}: lm_head.weight is not the embedding, but config.json's tie_word_embeddings is "
                        "true; set it to false")


def stored_dtypes(directory: Path) -> dict[str, str]:
    """The dtype that each of a checkpoint's tensors is stored in; some keep their norms in float32."""
    return {name: STORED_DTYPES[each.kind] for name, each in _headers(directory).items() if each.kind in STORED_DTYPES}


def stored_dtype(directory: Path) -> str:
    """The dtype the checkpoint's weights are stored in, told by the embedding: float32, bfloat16 or float16."""
    stored = _headers(directory)
    if EMBEDDING not in stored:
        raise UserError(f"{directory}: has no tensor {EMBEDDING}")
    _check_kind(directory, EMBEDDING, stored[EMBEDDING])
    return STORED_DTYPES[stored[EMBEDDING].kind]


# Out


def write_weights(params: Params, config: DecoderConfig, dtype: str, directory: Path | None,
          dtypes: Mapping[str, str] | None = None) -> None:
    """model.safetensors, or files of at most SHARD_BYTES with an index.

    With several processes all call it: each tensor is gathered from them, one after another.
    Args: dtype, of every tensor but those that dtypes names; directory, None where another process writes.
    Raises: OSError."""
    named = dtypes or {}
    shards: list[list[tuple[Layout, Values]]] = [[]]
    filled = total = 0
    for layout, value in _in_order(params, config):
        size = math.prod(layout.shape) * jnp.dtype(named.get(layout.name, dtype)).itemsize
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((layout, value))
        filled, total = filled + size, total + size
    if directory is None:
        for _, _, value in (each for shard in shards for each in _planned(shard, dtype, named)):
            jax.block_until_ready(sharding.gather_to_host(value()))
        return
    if len(shards) == 1:
        _write_file(directory / SINGLE_FILE, shards[0], dtype, named)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, shard, dtype, named)
        weight_map |= {layout.name: name for layout, _ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _in_order(params: Params, config: DecoderConfig) -> Iterator[tuple[Layout, Values]]:
    """Layouts in the order of the files, layer after layer, each with what gives its array."""
    table = layouts(config)
    for name in TOP_TENSORS:
        if name in table:
            yield table[name], functools.partial(params.__getitem__, name)
    for layer in range(config.layers):
        for name, parts in table["layers"].items():
            yield parts[layer], functools.partial(params["layers"][name].__getitem__, layer)


def _planned(tensors: list[tuple[Layout, Values]], dtype: str,
             dtypes: Mapping[str, str]) -> list[tuple[str, Layout, Values]]:
    """A file's tensors with their dtypes, the wider ones first: every value then starts at a multiple of its size."""
    return sorted(((dtypes.get(layout.name, dtype), layout, value) for layout, value in tensors),
                  key=lambda each: -jnp.dtype(each[0]).itemsize)


def _write_file(path: Path, tensors: list[tuple[Layout, Values]], dtype: str, dtypes: Mapping[str, str]) -> None:
    """One safetensors file, tensor by tensor: the library's own writer wants all of them in memory, twice.

    Source: the format is 8 bytes with the header's length, a JSON header, and the values one after another."""
    kinds = {name: kind for kind, name in STORED_DTYPES.items()}
    planned = _planned(tensors, dtype, dtypes)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}     # without it, older transformers refuse the file
    end = 0
    for each, layout, _ in planned:
        start, end = end, end + math.prod(layout.shape) * jnp.dtype(each).itemsize
        header[layout.name] = {"dtype": kinds[each], "shape": layout.stored_shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for each, layout, value in planned:
            array = sharding.to_host(value()).transpose(layout.order).reshape(layout.stored_shape)
            # As bytes: bfloat16 is no type that files know.
            file.write(np.ascontiguousarray(array.astype(jnp.dtype(each))).reshape(-1).view(np.uint8).data)
