"""Write a tiny random Gemma-3-shaped checkpoint folder: a stand-in for a trained demo model.

    python tools/make_demo_checkpoint.py FOLDER [--seed N]

Ten sliding layers of window 32 and two global ones, about 1.5 million bf16 parameters, a tokenizer of common English
words and a chat template. What it says is words in no order: it shows the machinery, not a mind. The same seed gives
the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
PAD, EOS, BOS, UNK, START_OF_TURN, END_OF_TURN = range(len(SPECIAL_TOKENS))
# Words a visitor may type and the model may say; each is one token, with and without the space before it.
SPOKEN = (
    "a about above across after again against air all almost along also always amber among an ancient and answer "
    "apple arrive as at autumn bake balance bank basket be beach bear because become before begin behind bell below "
    "beneath berry between beyond big bird blue boat book both bread breeze bridge bright bring brook build but "
    "butter by calm candle capital carry castle cat cedar chair cheese city clear climb clock cloud coast cold color "
    "come compass copper corn could count country cover cricket cross curious dance dark dawn day deep desert did "
    "distant do dog door down draw dream drum dry dusk each early earth east easy echo edge eight empty end enough "
    "evening every far farm feather few field find fire first fish five flag flame float flower fly fog follow for "
    "forest four fox fresh friend from frost fruit full garden gate gentle give glass go gold good grain grass gray "
    "great green ground grow half hand happy harbor has have he hear heart heavy hello help her here hidden high hill "
    "his hold honey hope horse hour house how hundred I ice if in ink inside into iron is island it ivory join "
    "journey jump just keep kettle kind king kite know lake lamp land lantern large last late laugh leaf learn left "
    "lemon less letter light like lily line linen lion list listen little live long look loud low make many map maple "
    "market marsh me meadow meet melody middle might milk mill mint mirror mist model moon more morning moss most "
    "mountain mouse move much music my name near never new next night nine no north not now number oak oar ocean of "
    "off often old olive on once one only open or orange orchard other our out over owl page paint pale paper past "
    "path pear pebble people piano pine place plain plant play please plum pocket poem pond pot promise quick quiet "
    "rain read ready red reed remember rest rice right ring river road rock roof room root rope rose round run sail "
    "salt same sand say school sea second see seed seven shade shadow she shell shine ship shore short silent silver "
    "sing six sky sleep slow small smile smoke snow so soft some song soon south sparrow spring stand star stay steam "
    "step still stone stop storm story stream street strong summer sun sunset sweet swim table take talk tall tea "
    "tell ten than that the their then there these they thing think this thread three through time to today together "
    "tomorrow tower town train travel tree true turn twelve two under until up us valley very village violet visit "
    "wait walk wall warm was watch water wave way we wear weather well were west what wheat wheel when where which "
    "while white who why wide wild will wind window winter wise with wood word work world would write year yellow yes "
    "yesterday you young your"
)
WORDS = SPOKEN.split()

VOCAB_SIZE = 3072
NUM_LAYERS = 12
HIDDEN, INTERMEDIATE = 128, 128
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 1, 32
WINDOW = 32
MAX_POSITION = 8192

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "dtype": "bfloat16",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": HEAD_DIM,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "max_position_embeddings": MAX_POSITION,
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "eos_token_id": [EOS, END_OF_TURN],
    "pad_token_id": PAD,
}


def main() -> int:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made where it does not exist; files of the same names are replaced")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    options = parser.parse_args()
    write(options.folder, options.seed)
    return 0


def write(folder: Path, seed: int = 0) -> None:
    """Write config, generation config, tokenizer and weights to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _vocabulary()
    _tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())
    _write_json(folder / "config.json", CONFIG)
    generation = {"bos_token_id": BOS, "do_sample": True, "eos_token_id": [EOS, END_OF_TURN], "pad_token_id": PAD}
    _write_json(folder / "generation_config.json", {**generation, "top_k": 64, "top_p": 0.95})
    path = folder / "model.safetensors"
    save_file(_weights(vocabulary, seed), path, metadata={"format": "pt"})
    path.chmod(0o644)


def _vocabulary() -> dict[str, int]:
    """Token to id: special tokens, the 256 bytes, then what leads to each word by one merge after the other."""
    names = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [left + right for left, right in _merges()]
    assert len(set(names)) == len(names) <= VOCAB_SIZE, len(names)
    return {name: index for index, name in enumerate(names)}


def _merges() -> list[tuple[str, str]]:
    """The byte-pair merges that build every word letter by letter, with and without a space before it."""
    merges: dict[tuple[str, str], None] = {}
    for spelled in ("Ġ", ""):
        for word in WORDS:
            built, letters = (spelled + word)[:1], (spelled + word)[1:]
            for letter in letters:
                merges.setdefault((built, letter))
                built += letter
    return list(merges)


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    """A byte-level BPE tokenizer that can spell anything and puts ``<bos>`` before a text."""
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(), unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "model_max_length": MAX_POSITION,
        "chat_template": CHAT_TEMPLATE,
    }


def _weights(vocabulary: dict[str, int], seed: int) -> dict[str, NDArray[Any]]:
    """Every tensor in bf16. Attention is sharp enough that what was said matters to what comes next."""
    rng = np.random.default_rng(seed)

    def linear(outputs: int, inputs: int, gain: float) -> NDArray[Any]:
        return (gain / np.sqrt(inputs) * rng.standard_normal((outputs, inputs), np.float32)).astype(ml_dtypes.bfloat16)

    def norm(size: int, scale: float) -> NDArray[Any]:
        return (scale * (1.0 + 0.2 * rng.standard_normal(size, np.float32)) - 1.0).astype(ml_dtypes.bfloat16)

    tensors: dict[str, NDArray[Any]] = {"model.embed_tokens.weight": _embedding(rng, vocabulary)}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": linear(NUM_HEADS * HEAD_DIM, HIDDEN, 1.0),
            f"{prefix}.self_attn.k_proj.weight": linear(NUM_KV_HEADS * HEAD_DIM, HIDDEN, 1.0),
            f"{prefix}.self_attn.v_proj.weight": linear(NUM_KV_HEADS * HEAD_DIM, HIDDEN, 1.0),
            f"{prefix}.self_attn.o_proj.weight": linear(HIDDEN, NUM_HEADS * HEAD_DIM, 1.0),
            f"{prefix}.self_attn.q_norm.weight": norm(HEAD_DIM, 1.5),
            f"{prefix}.self_attn.k_norm.weight": norm(HEAD_DIM, 1.5),
            f"{prefix}.mlp.gate_proj.weight": linear(INTERMEDIATE, HIDDEN, 1.0),
            f"{prefix}.mlp.up_proj.weight": linear(INTERMEDIATE, HIDDEN, 1.0),
            f"{prefix}.mlp.down_proj.weight": linear(HIDDEN, INTERMEDIATE, 1.0),
        }
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            tensors[f"{prefix}.{name}_layernorm.weight"] = norm(HIDDEN, 1.0)
    tensors["model.norm.weight"] = norm(HIDDEN, 10.0)
    return tensors


def _embedding(rng: np.random.Generator, vocabulary: dict[str, int]) -> NDArray[Any]:
    """Rows of whole words are large enough to be said; bytes, fragments and special tokens are not."""
    rows = 0.03 * rng.standard_normal((VOCAB_SIZE, HIDDEN), np.float32)
    said = np.zeros(VOCAB_SIZE, bool)
    said[[vocabulary["Ġ" + word] for word in WORDS if len(word) > 1]] = True
    rows[~said] *= 0.1
    return rows.astype(ml_dtypes.bfloat16)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
