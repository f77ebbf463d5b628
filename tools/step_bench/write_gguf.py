"""Write the weights of a Gemma 3 folder as one GGUF file, for llama.cpp. Runs where numpy and gguf are installed.

    python -m tools.step_bench.write_gguf FOLDER FILE.gguf f16|bf16

Matrices get the type asked for; bf16 is byte for byte what the folder has. The file has no tokenizer: it is for
measuring with token ids.

Owns: names and metadata of that file. Must never: import torch or hkv_jax.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
OF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor of the checkpoint.

    Raises:
        ValueError: it has no such tensor.
    """
    if name in TOP:
        return TOP[name]
    parts = name.split(".")
    inner = ".".join(parts[3:-1])
    if parts[:2] != ["model", "layers"] or parts[-1] != "weight" or inner not in OF_LAYER:
        raise ValueError(f"tensor {name} has no counterpart in llama.cpp's gemma3")
    return f"blk.{int(parts[2])}.{OF_LAYER[inner]}.weight"


def read_tensors(file: Path) -> dict[str, NDArray[np.uint16]]:
    """Every tensor of a safetensors file as the 16-bit words of its bf16 values; mapped, not loaded.

    Raises:
        ValueError: a tensor is not bf16.
    """
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    words = np.memmap(file, np.uint8, "r", offset=8 + size)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise ValueError(f"tensor {name} is {entry['dtype']}; only bf16 folders are converted")
        start, end = entry["data_offsets"]
        tensors[name] = words[start:end].view(np.uint16).reshape(entry["shape"])
    return tensors


def widen(words: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values bf16 words stand for, exactly."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def write(folder: Path, file: Path, dtype: str) -> None:
    """Writes ``file`` from the weights in ``folder``; under its name only when it is complete."""
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    unfinished = file.with_name(file.name + ".unfinished")
    writer = gguf.GGUFWriter(unfinished, "gemma3")
    _write_metadata(writer, config)
    for name, words in read_tensors(folder / "model.safetensors").items():
        if words.ndim == 1:
            # All vectors are norms, which the checkpoint keeps as their difference from one.
            writer.add_tensor(gguf_name(name), widen(words) + np.float32(1))
        elif dtype == "f16":
            writer.add_tensor(gguf_name(name), widen(words).astype(np.float16))
        else:
            writer.add_tensor(gguf_name(name), words.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(file)


def _write_metadata(writer: Any, config: dict[str, Any]) -> None:
    if config["model_type"] != "gemma3_text" or not config["tie_word_embeddings"]:
        raise ValueError("only gemma3_text with tied embeddings is converted")
    rope = config["rope_parameters"]
    full, sliding = rope["full_attention"], rope["sliding_attention"]
    if {full["rope_type"], sliding["rope_type"]} != {"default"}:
        raise ValueError("scaled RoPE is not converted")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_rope_freq_base_swa(sliding["rope_theta"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
