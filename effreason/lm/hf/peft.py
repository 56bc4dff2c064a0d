"""Reads and writes directories of low-rank adapters in the format of the peft library.

adapter_config.json says which weights have an adapter; adapter_model.safetensors holds for each of
them lora_A [rank, inputs] and lora_B [outputs, rank]. vLLM and SGLang read this format too.

Source: https://huggingface.co/docs/peft/main/en/developer_guides/checkpoint
"""

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from effreason.lm import adapters
from effreason.lm.architecture import DecoderConfig
from effreason.lm.hf import hub
from effreason.lm.hf.weights import LAYER_TENSORS, STORED_DTYPES
from effreason.lm.model import Params, abstract_params
from effreason.runtime import sharding
from effreason.runtime.errors import UserError
from effreason.runtime.files import check_present, read_json

CONFIG_FILE, WEIGHTS_FILE = hub.ADAPTER_FILE, "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
PREFIX = "base_model.model.model.layers."
# Ours -> the module's name in the base model.
MODULES = {name: LAYER_TENSORS[name][0].removesuffix(".weight") for name in adapters.TARGETS["all"]}
# Entries of adapter_config.json that change what an adapter computes, and the values we can read.
# Other ways to initialise also change the base model's weights.
READABLE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "modules_to_save": (None, []),
    "fan_in_fan_out": (False,), "lora_bias": (False,), "use_qalora": (False,),
    "trainable_token_indices": (None,), "target_parameters": (None, []),
    "layer_replication": (None, []), "alora_invocation_tokens": (None,), "use_bdlora": (None,),
    "arrow_config": (None,), "kasa_config": (None,), "monteclora_config": (None,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredAdapters:
    """Adapters in a directory that fit a base model, without their weights."""

    directory: Path
    ranks: dict[tuple[str, int], int]   # of each weight of ours, in each layer

    @property
    def rank(self) -> int:
        """The largest."""
        return max(self.ranks.values())

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(name for name in MODULES if any(name == key for key, _ in self.ranks))


def read_table(directory: Path) -> dict[str, Any]:
    """Reads adapter_config.json. Raises: UserError unless we can read adapters of that kind."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{directory}: must be a directory of adapters as peft writes them, found "
                        f"no {CONFIG_FILE} in it")
    table = read_json(path)
    for entry, readable in READABLE.items():
        if entry in table and table[entry] not in readable:
            raise UserError(f"{path}: {entry} must be {readable[0]}, got "
                            f"{json.dumps(table[entry])[:60]}")
    return table


def base_model(directory: Path) -> tuple[str, str | None]:
    """Returns the name or path of the model that adapters are for, and its revision, if given.

    Raises:
        UserError: They are of a kind that we cannot read, or there can be no such model."""
    table, path = read_table(directory), directory / CONFIG_FILE
    name, revision = table.get("base_model_name_or_path"), table.get("revision")
    if not isinstance(name, str) or not (name == "tiny" or Path(name).is_dir()
                                         or hub.is_hub_id(name)):
        raise UserError(f"{path}: base_model_name_or_path must be the directory of a model or its "
                        f"id on the Hugging Face Hub, got {json.dumps(name)[:200]}; name it there, "
                        "or in model.path, with these adapters as model.adapter")
    return name, revision if isinstance(revision, str) and not Path(name).is_dir() else None


def write_adapter(params: Params, config: DecoderConfig, directory: Path | None, *,
                  base_model: str, revision: str | None = None) -> None:
    """Writes the adapters of a policy. With several processes all call it.

    Args:
        params: a tree with the adapters, float32, and the setting of a dial.
        config: of the policy.
        directory: an existing one; None if another process writes.
        base_model: name or path of the model without adapters.
        revision: of that, on the Hub.

    Raises:
        OSError: a file cannot be written."""
    assert config.adapter is not None
    layers, setting = params["layers"], params.get(adapters.SETTING)
    rank, tensors = config.adapter.rank * (1 if setting is None else 2), {}
    targets = [name for name in config.adapter.targets if name + adapters.A in layers]
    for name in targets:
        a, b = sharding.to_host((layers[name + adapters.A], layers[name + adapters.B]))
        if setting is not None:         # both adapters side by side are one of twice the rank
            dial_a, dial_b, share = sharding.to_host(
                (layers[name + adapters.DIAL_A], layers[name + adapters.DIAL_B], setting))
            a = np.concatenate([a, dial_a], axis=-1)
            b = np.concatenate([b, share * dial_b], axis=1)
        for layer in range(config.layers):
            module = f"{PREFIX}{layer}.{MODULES[name]}"
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a[layer].reshape(-1, rank).T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b[layer].reshape(rank, -1).T)

    if directory is not None:
        save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        table = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
                 "base_model_name_or_path": base_model, "revision": revision, "r": rank,
                 "lora_alpha": config.adapter.scale * rank, "lora_dropout": 0.0, "bias": "none",
                 "fan_in_fan_out": False, "use_rslora": False,
                 "target_modules": sorted(MODULES[name].rpartition(".")[2] for name in targets)}
        (directory / CONFIG_FILE).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def resolve(path: str, revision: str | None,
            adapter: str | None = None) -> tuple[str, str | None, str | None]:
    """Returns a model's base, the revision of that, and the directory of its adapters, if any.

    Args:
        path: of a model, or a directory of adapters, whose base is named in it.
        revision: of the base, instead of one that is named in it.
        adapter: a directory of adapters for the model.

    Raises:
        UserError: see `base_model`, or there are adapters for adapters."""
    directory = hub.existing_export(Path(path))
    if directory is None or not hub.is_adapter(directory):
        if adapter is not None:
            read_table(Path(adapter))
        return path, revision, adapter
    if adapter is not None:
        raise UserError(f"model.adapter must be null if model.path, {path}, is a directory of "
                        f"adapters itself, got {adapter}")
    base, named = base_model(directory)
    return base, revision or named, str(directory)


def check_modules(config: DecoderConfig, place: str) -> None:
    """Raises UserError if a model's weights are not modules of their own, to which peft could add.

    Args:
        place: What is asked for, to begin the message."""
    # `read_adapter` and `write_adapter` also take it that all layers have the same weights.
    if config.fused or config.delta is not None:
        raise UserError(f"{place}: this model holds query, key and value in one tensor; its "
                        "adapters cannot be read or written in peft's format, merged weights can")


def open_adapter(directory: Path, config: DecoderConfig) -> StoredAdapters:
    """Checks that adapters fit a base model; reads only headers.

    Args:
        config: of the base model.

    Raises:
        UserError: a file is missing or damaged, or the adapters are of another kind or model."""
    check_modules(config, str(directory))
    read_table(directory)
    path, shapes = directory / WEIGHTS_FILE, _shapes(directory / WEIGHTS_FILE)
    weights = abstract_params(dataclasses.replace(config, adapter=None))["layers"]
    names = {module: name for name, module in MODULES.items() if name in weights}
    ranks: dict[tuple[str, int], int] = {}
    for key in shapes:
        match = re.fullmatch(re.escape(PREFIX) + r"(\d+)\.(.+)\.lora_[AB]\.weight", key)
        if match is None or match[2] not in names or int(match[1]) >= config.layers:
            raise UserError(f"{path}: holds tensor {key}, which the base model has no place for; "
                            f"it can have adapters for {', '.join(names)} of its "
                            f"{config.layers} layers")
        name, module = names[match[2]], key[:-len(".lora_A.weight")]
        tensors = [f"{module}.lora_{part}.weight" for part in "AB"]
        if missing := [tensor for tensor in tensors if tensor not in shapes]:
            raise UserError(f"{path}: has no tensor {missing[0]}")

        a, b = (shapes[tensor] for tensor in tensors)
        shape, folded = weights[name].shape[1:], adapters.INPUT_AXES.get(name, 1)
        inputs, outputs = math.prod(shape[:folded]), math.prod(shape[folded:])
        if len(a) != 2 or len(b) != 2 or (*a, *b) != (a[0], inputs, outputs, a[0]):
            raise UserError(f"{path}: the adapter of {module} has shapes {a} and {b}, the base "
                            f"model's weight has {inputs} inputs and {outputs} outputs")
        ranks[name, int(match[1])] = a[0]
    if not ranks:
        raise UserError(f"{path}: holds no adapter")
    return StoredAdapters(directory=directory, ranks=ranks)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a file's tensors. Raises: UserError if it cannot be read."""
    if not os.path.lexists(path) and (path.parent / PICKLED_FILE).exists():
        raise UserError(f"{path.parent}: has no {WEIGHTS_FILE}, only {PICKLED_FILE}, pickled by "
                        "PyTorch; load it with peft, and save_pretrained writes the other")
    check_present(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            headers = {key: file.get_slice(key) for key in file.keys()}
            for key, header in headers.items():
                if header.get_dtype() not in STORED_DTYPES:
                    raise UserError(f"{path}: tensor {key} is stored as {header.get_dtype()}, "
                                    f"expected one of {', '.join(STORED_DTYPES)}")
            return {key: tuple(header.get_shape()) for key, header in headers.items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None


def read_adapter(directory: Path, config: DecoderConfig) -> tuple[DecoderConfig, Params]:
    """Reads adapters for a base model.

    Args:
        config: of the base model.

    Returns:
        The configuration with the adapters, and their float32 matrices, {"layers": {name: [L,
        ...]}}. Those of smaller rank are padded with zeros; the scale is in the second matrix.

    Raises:
        UserError: see `open_adapter`."""
    table, stored = read_table(directory), open_adapter(directory, config)
    adapter = adapters.Adapter(rank=stored.rank, scale=1.0, targets=stored.targets)
    config = dataclasses.replace(config, adapter=adapter)
    shapes = abstract_params(config)["layers"]
    layers = {name + part: np.zeros(shapes[name + part].shape, np.float32)
              for name in stored.targets for part in (adapters.A, adapters.B)}

    with safetensors.safe_open(directory / WEIGHTS_FILE, framework="numpy") as file:
        for (name, layer), rank in stored.ranks.items():
            module = f"{layer}.{MODULES[name]}"
            inputs, outputs = (file.get_tensor(f"{PREFIX}{module}.lora_{part}.weight").astype(
                np.float32) for part in "AB")
            a, b = layers[name + adapters.A][layer], layers[name + adapters.B][layer]
            a[..., :rank] = inputs.T.reshape(*a.shape[:-1], rank)
            b[:rank] = _scale(table, f"model.layers.{module}", rank) * outputs.T.reshape(
                rank, *b.shape[1:])
    return config, {"layers": layers}


def _scale(table: dict[str, Any], module: str, rank: int) -> float:
    """Returns what peft multiplies the product of a module's matrices by."""
    patterns = table.get("alpha_pattern") or {}
    alpha = next((value for pattern, value in patterns.items()
                  if re.fullmatch(rf"(.*\.)?({pattern})", module)), table.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if table.get("use_rslora") else rank)
