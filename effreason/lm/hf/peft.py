"""Reads and writes directories of low-rank adapters in the format of the peft library.

adapter_config.json says which weights have an adapter; adapter_model.safetensors holds for each of
them lora_A [rank, inputs] and lora_B [outputs, rank]. vLLM and SGLang read this format too.

Source: https://huggingface.co/docs/peft/main/en/developer_guides/checkpoint
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

from effreason.lm import adapters
from effreason.lm.hf.weights import LAYER_TENSORS
from effreason.lm.model import DecoderConfig, Params, abstract_params
from effreason.runtime import sharding
from effreason.runtime.errors import UserError
from effreason.runtime.files import read_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers."
# Ours -> the module's name in the base model.
MODULES = {name: LAYER_TENSORS[name][0].removesuffix(".weight") for name in adapters.TARGETS["all"]}
# Entries of adapter_config.json that change what an adapter computes, and the values we can read.
READABLE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "modules_to_save": (None, []),
    "fan_in_fan_out": (False,), "lora_bias": (False,), "use_qalora": (False,),
    "trainable_token_indices": (None,), "target_parameters": (None, [])}


def is_adapter(directory: Path) -> bool:
    """Returns whether a directory holds adapters."""
    return (directory / CONFIG_FILE).is_file()


def write_adapter(params: Params, config: DecoderConfig, directory: Path | None, *,
                  base_model: str) -> None:
    """Writes the adapters of a policy. With several processes all call it.

    Args:
        params: a tree with the adapters, float32, and the setting of a dial.
        config: of the policy.
        directory: an existing one; None if another process writes.
        base_model: name or path of the model without adapters.

    Raises:
        OSError: a file cannot be written."""
    assert config.adapter is not None
    layers, setting = params["layers"], params.get(adapters.SETTING)
    rank, tensors = config.adapter.rank * (1 if setting is None else 2), {}
    for name in config.adapter.targets:
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
                 "base_model_name_or_path": base_model, "r": rank,
                 "lora_alpha": config.adapter.scale * rank, "lora_dropout": 0.0, "bias": "none",
                 "fan_in_fan_out": False, "use_rslora": False,
                 "target_modules": sorted(MODULES[name].rpartition(".")[2]
                                          for name in config.adapter.targets)}
        (directory / CONFIG_FILE).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def read_adapter(directory: Path, config: DecoderConfig) -> tuple[DecoderConfig, Params]:
    """Reads adapters for a base model.

    Args:
        config: of the base model.

    Returns:
        The configuration with the adapters, and their float32 matrices, {"layers": {name: [L,
        ...]}}. Those of smaller rank are padded with zeros; the scale is in the second matrix.

    Raises:
        UserError: a file is missing or damaged, or the adapters are of another kind or model."""
    table = read_json(directory / CONFIG_FILE)
    for entry, readable in READABLE.items():
        if entry in table and table[entry] not in readable:
            raise UserError(f"{directory / CONFIG_FILE}: {entry} must be {readable[0]}, got "
                            f"{json.dumps(table[entry])[:60]}")

    path = directory / WEIGHTS_FILE
    try:
        stored = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None

    pairs: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    names = {module: name for name, module in MODULES.items()}
    while stored:
        key = next(iter(stored))
        match = re.fullmatch(re.escape(PREFIX) + r"(\d+)\.(.+)\.lora_[AB]\.weight", key)
        if match is None or match[2] not in names or int(match[1]) >= config.layers:
            raise UserError(f"{path}: holds tensor {key}, which the base model has no place for")
        module = key[:-len(".lora_A.weight")]
        try:
            a, b = (stored.pop(f"{module}.lora_{part}.weight").astype(np.float32) for part in "AB")
        except KeyError as error:
            raise UserError(f"{path}: has no tensor {error.args[0]}") from None
        scale = _scale(table, f"model.layers.{match[1]}.{match[2]}", rank=a.shape[0])
        pairs.setdefault(names[match[2]], {})[int(match[1])] = a.T, scale * b.T
    if not pairs:
        raise UserError(f"{path}: holds no adapter")

    rank = max(a.shape[-1] for layers in pairs.values() for a, _ in layers.values())
    adapter = adapters.Adapter(rank=rank, scale=1.0, targets=tuple(pairs))
    config = dataclasses.replace(config, adapter=adapter)
    shapes = abstract_params(config)["layers"]
    layers: dict[str, np.ndarray] = {}
    for name, by_layer in pairs.items():
        a, b = (np.zeros(shapes[name + part].shape, np.float32)
                for part in (adapters.A, adapters.B))
        for layer, (inputs, outputs) in by_layer.items():
            _check_shapes(path, f"{PREFIX}{layer}.{MODULES[name]}", inputs, outputs, a[0], b[0])
            size = inputs.shape[1]
            a[layer][..., :size] = inputs.reshape(*a.shape[1:-1], size)
            b[layer][:size] = outputs.reshape(size, *b.shape[2:])
        layers |= {name + adapters.A: a, name + adapters.B: b}
    return config, {"layers": layers}


def _scale(table: dict[str, Any], module: str, rank: int) -> float:
    """Returns what peft multiplies the product of a module's matrices by."""
    patterns = table.get("alpha_pattern") or {}
    alpha = next((value for pattern, value in patterns.items()
                  if re.fullmatch(rf"(.*\.)?({pattern})", module)), table.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if table.get("use_rslora") else rank)


def _check_shapes(path: Path, module: str, inputs: np.ndarray, outputs: np.ndarray, a: np.ndarray,
                  b: np.ndarray) -> None:
    """Raises UserError unless the two matrices fit the base model's weight."""
    expected = a[..., 0].size, b[0].size
    found = inputs.shape[0], outputs.shape[1]
    if found != expected or inputs.shape[1] != outputs.shape[0]:
        raise UserError(f"{path}: the adapter of {module} has shapes {inputs.T.shape} and "
                        f"{outputs.T.shape}, the base model's weight has {expected[0]} inputs and "
                        f"{expected[1]} outputs")
