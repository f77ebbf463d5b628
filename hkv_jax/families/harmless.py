"""The fields of a ``config.json`` that change nothing in inference, and what becomes of all others that nobody reads.

Owns: the list of fields that may be ignored, and the strictness towards the rest. Must never: let a field pass whose
effect is not known.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from hkv_jax.errors import ConfigError
from hkv_jax.families.fields import Fields, shown

logger = logging.getLogger("hkv_jax.families")

_NAMES_AND_VERSIONS = (
    *("_name_or_path", "name_or_path", "_model_name_or_path", "_commit_hash", "auto_map", "tokenizer_class"),
    "transformers_version",
    *("transformers.js_config", "unsloth_fixed", "unsloth_version", "is_llama_config", "model_name", "finetuning_task"),
)
_TRAINING = (
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "dropout", "initializer_range"),
    *("gradient_checkpointing", "neftune_noise_alpha", "num_labels", "id2label", "label2id", "problem_type"),
    *("use_bfloat16", "torchscript", "task_specific_params"),
)
# How another runtime computes or caches, not what it computes.
_EXECUTION = (
    *("use_cache", "cache_implementation", "attn_implementation", "_attn_implementation", "experts_implementation"),
    *("_attn_implementation_autoset", "output_attentions", "output_hidden_states", "output_scores", "return_dict"),
    *("return_dict_in_generate", "chunk_size_feed_forward", "pretraining_tp", "is_decoder", "tie_last_hidden_states"),
)
_TOKENS = ("pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id")
# Left over from the time when a config told how to generate; generation_config.json does now.
_GENERATION = (
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature", "top_k", "top_p"),
    *("typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "num_beam_groups"),
    *("diversity_penalty", "prefix"),
)
_IGNORED = frozenset((*_NAMES_AND_VERSIONS, *_TRAINING, *_EXECUTION, *_TOKENS, *_GENERATION))

# Fields of families at large that change the result unless they have this value.
_ONLY: dict[str, object] = {
    "add_cross_attention": False,
    "attention_bias": False,
    "is_causal": True,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_bidirectional_attention": False,
    "use_qk_norm": False,
    "use_sliding_window": False,
}
_REMEDIES = {
    "quantization_config": "use the checkpoint before it was quantized",
    "sliding_window": "a llama model with windows is model_type cwm, which has layer_types",
}


def settle_unread(fields: Fields, model_type: str, also_ignored: Iterable[str] = ()) -> None:
    """Refuses what may change the result, and logs the rest in one line.

    Args:
        fields: the fields of a config after its family has read what it knows.
        model_type: for the messages.
        also_ignored: further fields that change nothing in this family.

    Raises:
        ConfigError: a field is not known to be harmless, and is not null.
    """
    ignored = _IGNORED.union(also_ignored)
    unread = fields.unread()
    for name, value in unread.items():
        if value is None or name in ignored:
            continue
        if name not in _ONLY:
            remedy = _REMEDIES.get(name, "remove it if it changes nothing in inference")
            raise ConfigError(
                f"{fields.where}: {name} ({shown(value)}) is not supported for {model_type}, and may change what the "
                f"model computes; {remedy}"
            )
        if value != _ONLY[name]:
            accepted = f"null or {shown(_ONLY[name])}; anything else would change what a {model_type} model computes"
            raise fields.error(name, accepted)
    if unread:
        logger.info("%s: ignored, since they change nothing here: %s", fields.where, ", ".join(sorted(unread)))
