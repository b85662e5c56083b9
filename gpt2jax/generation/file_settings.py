"""Settings of generation that lie beside the weights: one rule for which of them count.

`generate`, `stream` and `beam_search` without a config, and the command `generate`, begin with what
generation_config.json beside the weights holds, under transformers' names and with their meaning. What the file does
not hold has the default of `GenerationConfig`, which is to sample among 5 tokens; transformers' default is greedy. A
setting that the call gives wins over that of the file, and over those of the file that do not go with it. A
`GenerationConfig` that the call gives counts alone: `GenerationConfig()` stands for the defaults. A notice shows what
the file changes, and `Generation.file_settings` keeps it.

If there is no such file, or transformers derived it from config.json (`_from_model_config`), the settings of
generation in config.json count as well, unless they are transformers' defaults, which its old versions wrote there.

Source: `GenerationConfig` and `GenerationMixin._prepare_generation_config` of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt2jax.generation.config import DecoderModel, GenerationConfig, excluded_by
from gpt2jax.utils.notices import notice
from gpt2jax.utils.validation import check, each, field_rules, is_integer, non_negative_int
from gpt2jax.weights.saved_settings import SavedSettings

# those of the same name and meaning, and transformers' defaults
_SHARED = {
    "max_new_tokens": None,
    "max_length": 20,
    "min_new_tokens": None,
    "min_length": 0,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "stop_strings": None,
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "num_return_sequences": 1,
    "penalty_alpha": None,
}
_TOKEN_LISTS = {"bad_words_ids": None, "suppress_tokens": None}
# those that change a continuation and that we do not have; the value that switches one off is false, or 1,
# except of those where 0 and 1 are ids or a time
_ANY_NUMBER = ("forced_bos_token_id", "forced_eos_token_id", "max_time")
_UNSUPPORTED = (
    *("epsilon_cutoff", "eta_cutoff", "top_h", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
    *(
        "diversity_penalty",
        "num_beam_groups",
        "exponential_decay_length_penalty",
        "sequence_bias",
        "max_time",
    ),
    *(
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "token_healing",
        "guidance_scale",
    ),
    *("watermarking_config", "force_words_ids", "constraints", "dola_layers"),
)
# when a file holds both: the first wins
_WINNERS = ("max_new_tokens", "min_new_tokens", "num_beams", "penalty_alpha")


def find_file_settings(model: DecoderModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings beside a model's weights that count in a call; a notice shows them.

    Args:
        model: a model whose `saved`, if it has one, holds the files.
        given: the settings that the call gives.

    Returns:
        Values for fields of `GenerationConfig`.

    Raises:
        ValueError: the file holds a value that is not legal for a setting that counts.
    """
    if getattr(model, "saved", None) is None:
        return {}
    source, found, unsupported = _read_settings(model, given)
    _tell(source, found, unsupported, given)
    return found


def notice_illegal_settings(model: DecoderModel) -> None:
    """Give a notice of a setting beside a model's weights that will be an error in calls which do not give it."""
    try:
        _read_settings(model, {})
    except ValueError as error:
        notice(f"{error}; to generate text, give this setting in the call, or correct the file")


def _read_settings(model: DecoderModel, given: Mapping[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
    """Return the name of the file, the settings that count, and the names of those that are not supported."""
    source, content = _read_content(getattr(model, "saved", SavedSettings()))
    lost = {*given, *excluded_by(given)}
    found = {name: content[name] for name in _SHARED if name in content and name not in lost}
    if found.get("top_k") == 0:  # off
        found["top_k"] = None
    if found.get("do_sample"):  # transformers searches only without sampling
        found.pop("penalty_alpha", None)
    if is_integer(found.get("max_length")) and given.get("overflow") != "sliding_window":
        found["max_length"] = min(found["max_length"], model.config.n_positions)
    if "bad_words" not in lost:
        found |= _read_bad_words(source, content, model.config.vocab_size)
    rules = field_rules(GenerationConfig)
    found = {name: check(f"{source}: {name}", value, rules[name]) for name, value in found.items()}
    unsupported = [
        name
        for name in _UNSUPPORTED
        if name in content and (name in _ANY_NUMBER or (content[name] and content[name] != 1))
    ]
    for name in _WINNERS:
        for other in excluded_by({name: found[name]} if name in found else {}):
            found.pop(other, None)
    if {"num_beams": 1, **found, **given}["num_beams"] == 1:
        found.pop("length_penalty", None)
        found.pop("early_stopping", None)
    elif found.get("do_sample"):
        unsupported.append("do_sample with num_beams")
    return source, found, unsupported


def _read_content(saved: SavedSettings) -> tuple[str, dict[str, Any]]:
    """Return what the files hold, null left out, and the name of the file."""
    content, source = dict(saved.generation), "generation_config.json"
    if saved.is_derived:
        defaults = {**_SHARED, **_TOKEN_LISTS, **dict.fromkeys(_UNSUPPORTED)}
        old = {
            name: value
            for name, value in saved.config.items()
            if name in defaults and value not in (None, defaults[name])
        }
        content, source = {**old, **content}, "config.json" if old else source
    return source, {name: value for name, value in content.items() if value is not None}


def _read_bad_words(source: str, content: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return `bad_words` of lists of ids; those with an id outside the vocabulary can't occur."""
    words = check(f"{source}: bad_words_ids", content.get("bad_words_ids", ()), each(each(non_negative_int)))
    tokens = check(f"{source}: suppress_tokens", content.get("suppress_tokens", ()), each(non_negative_int))
    kept = [
        word
        for word in (*words, *((token,) for token in tokens))
        if max(word, default=vocab_size) < vocab_size
    ]
    return {"bad_words": kept} if kept else {}


def _tell(source: str, found: Mapping[str, Any], unsupported: list[str], given: Mapping[str, Any]) -> None:
    """Give a notice of what a file changes."""
    defaults = GenerationConfig()
    changed = [f"{name}={found[name]!r:.60}" for name in found if found[name] != getattr(defaults, name)]
    parts = [f"sets {', '.join(changed)} (a setting of the call wins)"] if changed else []
    if unsupported:
        parts.append(f"asks for {', '.join(unsupported)}, which is not supported and has no effect")
    if found.get("do_sample") and not {"top_k", "num_beams"} & {*found, *given}:
        parts.append(f"samples without top_k, which is {defaults.top_k} here and 50 in transformers")
    if parts:
        notice(f"{source} beside the weights {'; it '.join(parts)}")
