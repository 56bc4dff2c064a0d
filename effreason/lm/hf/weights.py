"""Reads and writes weights in safetensors files.

One table says which tensor holds each weight and in which layout. Hugging Face stores matrices as
[out, in] and folds the heads into one axis. We store [in, out], with an axis for the heads, and
stack layers on a leading axis. A tensor may hold several of our weights, one after another. Reading
and writing both use the table. Both hold one tensor at a time on the host, besides what the devices
hold.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Sharding

from effreason.lm.architecture import DecoderConfig
from effreason.lm.hf.config import assumed_sizes
from effreason.lm.model import Params, abstract_params, stacks
from effreason.runtime import sharding
from effreason.runtime.errors import UserError
from effreason.runtime.files import check_present, read_json
from effreason.runtime.sharding import Shardings

GetValues = Callable[[], Any]       # returns one weight's values

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
OTHER_WEIGHTS = (*PICKLED, ".h5", ".msgpack", ".gguf", ".safetensors")
SHARD_BYTES = 5_000_000_000

# Ours -> the name in the files, and for each axis there, which of our axes it folds, in order.
TABLE, VECTOR, MATRIX = ((0,), (1,)), ((0,),), ((1,), (0,))
HEADS_OUT, HEADS_IN, HEAD_BIAS = ((1, 2), (0,)), ((2,), (0, 1)), ((0, 1),)
TAPS = ((0, 1), (), (2,))           # torch's convolutions have an axis of length 1
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
    "output_bias": ("self_attn.o_proj.bias", VECTOR),
    "mlp_norm": ("post_attention_layernorm.weight", VECTOR),
    "gate": ("mlp.gate_proj.weight", MATRIX),
    "up": ("mlp.up_proj.weight", MATRIX),
    "down": ("mlp.down_proj.weight", MATRIX),
    "gate_bias": ("mlp.gate_proj.bias", VECTOR),
    "router": ("mlp.gate.weight", MATRIX),
    "up_bias": ("mlp.up_proj.bias", VECTOR),
    "down_bias": ("mlp.down_proj.bias", VECTOR),
    "delta_query": ("linear_attn.in_proj_qkv.weight", HEADS_OUT),
    "delta_key": ("linear_attn.in_proj_qkv.weight", HEADS_OUT),
    "delta_value": ("linear_attn.in_proj_qkv.weight", HEADS_OUT),
    "query_taps": ("linear_attn.conv1d.weight", TAPS),
    "key_taps": ("linear_attn.conv1d.weight", TAPS),
    "value_taps": ("linear_attn.conv1d.weight", TAPS),
    "delta_beta": ("linear_attn.in_proj_b.weight", MATRIX),
    "time_step": ("linear_attn.in_proj_a.weight", MATRIX),
    "time_step_bias": ("linear_attn.dt_bias", VECTOR),
    "log_decay_rate": ("linear_attn.A_log", VECTOR),
    "delta_gate": ("linear_attn.in_proj_z.weight", HEADS_OUT),
    "delta_norm": ("linear_attn.norm.weight", VECTOR),
    "delta_output": ("linear_attn.out_proj.weight", HEADS_IN),
}
# Of each expert; the number is the expert's.
EXPERT_TENSORS = {
    "expert_gate": ("mlp.experts.{}.gate_proj.weight", MATRIX),
    "expert_up": ("mlp.experts.{}.up_proj.weight", MATRIX),
    "expert_down": ("mlp.experts.{}.down_proj.weight", MATRIX),
}
# With norms after attention and MLP, the one before the MLP has another name.
OUTPUT_NORMS = {
    "attention_output_norm": ("post_attention_layernorm.weight", VECTOR),
    "mlp_norm": ("pre_feedforward_layernorm.weight", VECTOR),
    "mlp_output_norm": ("post_feedforward_layernorm.weight", VECTOR),
}
# Norms over all heads, which have an axis for them.
HEADS_NORMS = {name: (LAYER_TENSORS[name][0], HEAD_BIAS) for name in ("query_norm", "key_norm")}
# Tensors that hold several weights, in this order: in all models, and in some.
JOINED = {"linear_attn.in_proj_qkv.weight": ("delta_query", "delta_key", "delta_value"),
          "linear_attn.conv1d.weight": ("query_taps", "key_taps", "value_taps")}
FUSED = {"self_attn.qkv_proj.weight": ("query", "key", "value"),
         "mlp.gate_up_proj.weight": ("gate", "up")}
EMBEDDING, HEAD = TOP_TENSORS["embedding"][0], TOP_TENSORS["head"][0]
EMBEDDING_END = re.compile(r"((?:.*\.)?)embed_tokens\.weight")
# Buffers that older exports hold besides the weights; config.json determines them.
BUFFERS = (".rotary_emb.inv_freq", ".self_attn.bias", ".self_attn.masked_bias")


@dataclasses.dataclass(frozen=True)
class Layout:
    """One tensor of the files, or what is one weight's of it."""

    name: str
    shape: tuple[int, ...]                  # ours
    # For each stored axis, which of ours it folds: none if its length is 1.
    folds: tuple[tuple[int, ...], ...]
    start: int = 0                          # where this weight begins on the first stored axis
    rows: int | None = None                 # length of that axis, if the tensor holds others too

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The shape of this weight's part of the tensor."""
        return tuple(math.prod(self.shape[axis] for axis in fold) for fold in self.folds)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.own_shape if self.rows is None else (self.rows, *self.own_shape[1:])

    @property
    def order(self) -> tuple[int, ...]:
        return tuple(axis for fold in self.folds for axis in fold)


Tensor = list[tuple[Layout, GetValues]]     # the weights that a tensor holds, in its order
Stack: TypeAlias = "Layout | tuple[Stack, ...]"     # of the layers, and of their experts if any


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor's file, and what its header says."""

    file: Path
    name: str                       # in the file, which may have other prefixes
    dtype: str                      # F32, BF16, ...
    shape: tuple[int, ...]


def layouts(config: DecoderConfig) -> Params:
    """Returns the tree of the weights with a Layout for each; those of a layer are in tuples of one
    for each layer that has the weight, or of one for each expert."""
    abstract = abstract_params(config)
    shapes = {name: leaf.shape[1:] for name, leaf in abstract["layers"].items()}
    experts = {name: Layout(EXPERT_TENSORS[name][0], shapes.pop(name)[1:],
                            EXPERT_TENSORS[name][1]) for name in EXPERT_TENSORS if name in shapes}
    table = LAYER_TENSORS | (OUTPUT_NORMS if config.norms_output else {})
    table |= HEADS_NORMS if config.qk_norm == "all_heads" else {}
    layer = {name: Layout(table[name][0], shape, table[name][1]) for name, shape in shapes.items()}
    for fused, names in (JOINED | (FUSED if config.fused else {})).items():
        if names[0] not in layer:
            continue
        ends = list(itertools.accumulate(layer[name].own_shape[0] for name in names))
        for name, start in zip(names, [0, *ends], strict=False):
            layer[name] = dataclasses.replace(layer[name], name=fused, start=start, rows=ends[-1])

    def of_layer(layout: Layout, index: int) -> Layout:
        return dataclasses.replace(layout, name=f"model.layers.{index}.{layout.name}")

    def of_experts(layout: Layout) -> Stack:
        return tuple(dataclasses.replace(layout, name=layout.name.format(number))
                     for number in range(config.experts))

    having = stacks(config)
    layers: dict[str, Stack] = {
        name: tuple(of_layer(layout, index) for index in having[name])
        for name, layout in layer.items()}
    layers |= {name: tuple(of_experts(of_layer(layout, index)) for index in having[name])
               for name, layout in experts.items()}
    top = {name: Layout(TOP_TENSORS[name][0], leaf.shape, TOP_TENSORS[name][1])
           for name, leaf in abstract.items() if name != "layers"}
    return top | {"layers": layers}


def weight_files(directory: Path) -> list[str]:
    """Returns the names of the files with the weights. Raises: UserError if there are none.

    A single file goes before an index, as in transformers."""
    index = directory / INDEX_FILE
    if os.path.lexists(directory / SINGLE_FILE):
        return [SINGLE_FILE]
    if os.path.lexists(index):
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{index}: has no table weight_map")
        for name in names.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{index}: weight_map must name files next to it, got "
                                f"{json.dumps(name)[:60]}")
        return sorted(set(names.values()))
    others = sorted(path.name for path in directory.iterdir() if path.suffix in OTHER_WEIGHTS)
    hint = f", only {others[0]}{', ...' * (len(others) > 1)}" if others else ""
    if others and others[0].endswith(PICKLED):
        hint += ", pickled by PyTorch"
    raise UserError(f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}; weights must "
                    "be as save_pretrained of transformers writes them, in safetensors")


def read_weights(directory: Path, config: DecoderConfig,
                 shardings: Shardings | None = None) -> Params:
    """Returns float32 weights, stacked over layers; shards are read and placed one by one.

    Args:
        shardings: A tree like the weights; None leaves them on the default device.

    Raises:
        UserError: A tensor is missing, has another shape than config.json says, or is not one of
            this decoder's: the checkpoint would mean something else."""
    stored, table = check_weights(directory, config), layouts(config)
    if config.tied and HEAD in stored:
        _check_tied(directory, stored)

    def place(table: Params, shardings: Shardings | None) -> Params:
        params = {}
        for name, parts in table.items():
            target = None if shardings is None else shardings[name]
            params[name] = (place(parts, target) if isinstance(parts, dict)
                            else _place(stored, parts, target))
        return params

    return place(table, shardings)


def _shape(parts: Stack) -> tuple[int, ...]:
    """Returns the shape of one of our weights."""
    return parts.shape if isinstance(parts, Layout) else (len(parts), *_shape(parts[0]))


def _place(stored: dict[str, Stored], parts: Stack, target: Sharding | None) -> jax.Array:
    """Puts one of our weights on its devices. A shard that several devices hold is read once."""
    shape = _shape(parts)
    if target is None:
        return jax.device_put(_read(stored, parts, tuple(slice(0, size) for size in shape)))

    holders: dict[Any, list[Any]] = collections.defaultdict(list)
    for device, index in target.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        holders[bounds].append(device)

    arrays = []
    for bounds, devices in holders.items():
        value = _read(stored, parts, tuple(slice(*pair) for pair in bounds))
        # Copies to a device run in the background: wait, to hold one shard at a time on the host.
        arrays += jax.block_until_ready([jax.device_put(value, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, target, arrays)


def _read(stored: dict[str, Stored], parts: Stack, index: tuple[slice, ...]) -> np.ndarray:
    """Returns the float32 values of one shard of a weight."""
    def fill(value: np.ndarray, parts: Stack, index: tuple[slice, ...]) -> None:
        if isinstance(parts, Layout):
            value[...] = _read_part(stored[parts.name], parts, index)
            return
        for row, part in zip(value, parts[index[0]], strict=True):
            fill(row, part, index[1:])

    value = _aligned(tuple(part.stop - part.start for part in index))
    fill(value, parts, index)
    return value


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Returns an empty float32 array, aligned to 64 bytes: the CPU backend needs no copy."""
    size = math.prod(shape)
    buffer = np.empty(size + 16, np.float32)
    start = -buffer.ctypes.data % 64 // 4
    return buffer[start : start + size].reshape(shape)


def _read_part(tensor: Stored, layout: Layout, index: tuple[slice, ...]) -> np.ndarray:
    """Returns one tensor's slice, in our axes and the stored dtype.

    The file is sliced along each fold's leading axis, as one block; the other axes are cut here."""
    leading = [fold[0] for fold in layout.folds if fold]

    def rows(number: int, fold: tuple[int, ...]) -> slice:
        if not fold:
            return slice(0, 1)
        size = math.prod(layout.shape[axis] for axis in fold[1:])
        offset = layout.start if number == 0 else 0
        return slice(offset + index[fold[0]].start * size, offset + index[fold[0]].stop * size)

    block = tuple(rows(number, fold) for number, fold in enumerate(layout.folds))
    # Opened for each tensor: pages that were read count as this process's while the file is open.
    with safetensors.safe_open(tensor.file, framework="numpy") as tensors:
        part = tensors.get_slice(tensor.name)[block]

    part = part.reshape([index[axis].stop - index[axis].start if axis in leading
                         else layout.shape[axis] for axis in layout.order])
    part = part[tuple(slice(None) if axis in leading else index[axis] for axis in layout.order)]
    return part.transpose(np.argsort(layout.order))


def _headers(directory: Path) -> dict[str, Stored]:
    """Reads the headers of all files. The index names the files; their headers name the tensors."""
    tensors = []
    for name in weight_files(directory):
        file = directory / name
        check_present(file)
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                for tensor in opened.keys():
                    header = opened.get_slice(tensor)
                    tensors.append(Stored(file, tensor, header.get_dtype(),
                                          tuple(header.get_shape())))
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{file}: cannot be read as safetensors ({error})") from None

    names = _standard_names({tensor.name for tensor in tensors})
    stored: dict[str, Stored] = {}
    for tensor in tensors:
        name = names[tensor.name]
        if name in stored:
            raise UserError(f"{directory}: tensor {stored[name].name} is in "
                            f"{stored[name].file.name} and in {tensor.file.name}"
                            + f", as {tensor.name}" * (tensor.name != stored[name].name))
        stored[name] = tensor
    return stored


def _standard_names(names: Collection[str]) -> dict[str, str]:
    """Returns for each name in the files the one that a causal model of transformers has.

    A base class leaves out `model.`; compiled, wrapped and multimodal models put more before it.
    What precedes the embedding is the prefix, unless there are several embeddings."""
    prefixes = [match[1] for name in names if (match := EMBEDDING_END.fullmatch(name))]
    prefix = prefixes[0] if len(prefixes) == 1 else "model."

    def standard(name: str) -> str:
        wrapper = name.removesuffix(HEAD)
        if wrapper != name and prefix.startswith(wrapper) and wrapper[-1:] in ("", "."):
            return HEAD
        return f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name

    return {name: standard(name) for name in names}


def check_weights(directory: Path, config: DecoderConfig) -> dict[str, Stored]:
    """Returns the tensors of the files by name; reads only headers.

    Raises: UserError unless they are those of the decoder, and no others."""
    stored = _headers(directory)
    expected: list[Layout] = jax.tree.leaves(layouts(config))
    for layout in expected:
        if layout.name not in stored:
            hint = ("; config.json's tie_word_embeddings is not true" if layout.name == HEAD
                    else assumed_sizes(directory, config))
            raise UserError(f"{directory}: has no tensor {layout.name}{hint}")
        tensor = stored[layout.name]
        _check_dtype(directory, layout.name, tensor)
        if tensor.shape != layout.stored_shape:
            difference = (f"shape {tensor.shape}, config.json expects {layout.stored_shape}"
                          + assumed_sizes(directory, config))
            if layout.folds == TABLE and tensor.shape[1:] == layout.stored_shape[1:]:
                difference = (f"{tensor.shape[0]} rows, config.json's vocab_size is "
                              f"{config.vocabulary}{assumed_sizes(directory, config)}")
            raise UserError(f"{directory}: tensor {layout.name} has {difference}")

    names = {layout.name for layout in expected} | ({HEAD} if config.tied else set())
    unread = sorted(name for name in stored.keys() - names
                    if not name.endswith(BUFFERS) and not name.startswith(config.copied_prefixes))
    for name in stored.keys() - names - set(unread):
        if name.startswith(config.copied_prefixes):
            _check_dtype(directory, name, stored[name])
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        raise UserError(f"{directory}: holds tensor {stored[unread[0]].name}{more}, which the "
                        "decoder that config.json describes does not have"
                        + assumed_sizes(directory, config))
    return stored


def _check_dtype(directory: Path, name: str, tensor: Stored) -> None:
    if tensor.dtype not in STORED_DTYPES:
        raise UserError(f"{directory}: tensor {name} is stored as {tensor.dtype}, expected one of "
                        f"{', '.join(STORED_DTYPES)}")


def _check_tied(directory: Path, stored: dict[str, Stored]) -> None:
    """Raises UserError if a head that config.json calls tied is not the embedding.

    transformers would use that head."""
    head, embedding = stored[HEAD], stored[EMBEDDING]
    is_same = head.dtype == embedding.dtype and head.shape == embedding.shape
    with (safetensors.safe_open(head.file, "numpy") as head_file,
          safetensors.safe_open(embedding.file, "numpy") as embedding_file):
        one, other = head_file.get_slice(head.name), embedding_file.get_slice(embedding.name)
        for start in range(0, head.shape[0] if is_same else 0, 4096):
            rows = slice(start, min(start + 4096, head.shape[0]))
            is_same = is_same and one[rows].tobytes() == other[rows].tobytes()
    if not is_same:
        raise UserError(f"{directory}: lm_head.weight is not the embedding, but config.json's "
                        "tie_word_embeddings is true; set it to false")


def stored_dtype(directory: Path) -> str:
    """Returns the embedding's stored dtype, as the checkpoint's: float32, bfloat16 or float16."""
    stored = _headers(directory)
    if EMBEDDING not in stored:
        raise UserError(f"{directory}: has no tensor {EMBEDDING}")
    _check_dtype(directory, EMBEDDING, stored[EMBEDDING])
    return STORED_DTYPES[stored[EMBEDDING].dtype]


def write_weights(params: Params, config: DecoderConfig, dtype: str, directory: Path | None,
                  source: Path | None = None) -> None:
    """Writes model.safetensors, or files of at most SHARD_BYTES with an index.

    With several processes all call it: tensors are gathered from them, one after another.

    Args:
        dtype: Of every tensor that is not in the source.
        directory: None if another process writes.
        source: The directory of the model that the weights are of. Tensors get the dtypes that they
            have there: some checkpoints keep norms in float32. Those that are not the decoder's are
            copied, see `DecoderConfig.copied_prefixes`.

    Raises:
        OSError: A file cannot be written."""
    stored = {} if source is None else _headers(source)
    dtypes = {name: STORED_DTYPES.get(tensor.dtype, dtype) for name, tensor in stored.items()}
    copied = [tensor for name, tensor in stored.items()
              if directory is not None and name.startswith(config.copied_prefixes)]
    names = {name: tensor.name for name, tensor in stored.items() if config.copied_prefixes}
    shards: list[list[Tensor]] = [[]]
    filled = total = 0
    for tensor in itertools.chain(_in_order(params, config), map(_copied, copied)):
        layout = tensor[0][0]
        size = math.prod(layout.stored_shape) * jnp.dtype(dtypes.get(layout.name, dtype)).itemsize
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled, total = filled + size, total + size

    if directory is None:
        # In the order in which the other process writes: gathering is a collective.
        for _, tensor in (planned for shard in shards for planned in _plan(shard, dtype, dtypes)):
            for _, value in tensor:
                jax.block_until_ready(sharding.gather_to_host(value()))
        return
    if len(shards) == 1:
        _write_file(directory / SINGLE_FILE, shards[0], dtype, dtypes, names)
        return

    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, shard, dtype, dtypes, names)
        weight_map |= {names.get(tensor[0][0].name, tensor[0][0].name): name for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _in_order(params: Params, config: DecoderConfig) -> Iterator[Tensor]:
    """Yields the tensors in the order of the files, layer by layer."""
    table = layouts(config)
    for name in TOP_TENSORS:
        if name in table:
            yield [(table[name], functools.partial(params.__getitem__, name))]
    having = stacks(config)
    for layer in range(config.layers):
        tensors: dict[str, Tensor] = collections.defaultdict(list)
        for name, parts in table["layers"].items():
            if layer not in having[name]:
                continue
            get, row = params["layers"][name].__getitem__, having[name].index(layer)
            if isinstance(parts[row], Layout):
                tensors[parts[row].name].append((parts[row], functools.partial(get, row)))
                continue
            for number, layout in enumerate(parts[row]):
                tensors[layout.name] = [(layout, functools.partial(get, (row, number)))]
        for tensor in tensors.values():
            yield sorted(tensor, key=lambda part: part[0].start)


def _copied(tensor: Stored) -> Tensor:
    """Returns a tensor of another model's files, to be written as it is."""
    def values() -> np.ndarray:
        with safetensors.safe_open(tensor.file, framework="numpy") as tensors:
            return tensors.get_tensor(tensor.name)

    return [(Layout(tensor.name, tensor.shape, tuple((axis,) for axis in range(len(tensor.shape)))),
             values)]


def _plan(tensors: list[Tensor], dtype: str,
          dtypes: Mapping[str, str]) -> list[tuple[str, Tensor]]:
    """Returns a file's tensors with their dtypes, wide ones first, so that all are aligned."""
    planned = [(dtypes.get(tensor[0][0].name, dtype), tensor) for tensor in tensors]
    return sorted(planned, key=lambda tensor: -jnp.dtype(tensor[0]).itemsize)


def _write_file(path: Path, tensors: list[Tensor], dtype: str, dtypes: Mapping[str, str],
                names: Mapping[str, str]) -> None:
    """Writes one safetensors file, tensor by tensor: the library needs all in memory, twice.

    The format is 8 bytes with the header's length, a JSON header, and the values.

    Args:
        names: Of tensors in the file, if they are others than ours."""
    codes = {dtype: code for code, dtype in STORED_DTYPES.items()}
    planned = _plan(tensors, dtype, dtypes)
    # Older transformers refuse a file without this entry.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor_dtype, tensor in planned:
        layout = tensor[0][0]
        start, end = end, end + math.prod(layout.stored_shape) * jnp.dtype(tensor_dtype).itemsize
        header[names.get(layout.name, layout.name)] = {
            "dtype": codes[tensor_dtype], "shape": layout.stored_shape,
            "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor_dtype, tensor in planned:
            for layout, value in tensor:
                array = sharding.to_host(value()).transpose(layout.order).reshape(layout.own_shape)
                # As bytes: NumPy cannot write bfloat16.
                array = np.ascontiguousarray(array.astype(jnp.dtype(tensor_dtype)))
                file.write(array.reshape(-1).view(np.uint8).data)
