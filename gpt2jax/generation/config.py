"""`GenerationConfig`: every setting of generation, its default, its rule and its explanation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from gpt2jax.utils.validation import (
    Rule,
    check_names,
    each,
    field_names,
    in_range,
    int_in_range,
    is_integer,
    must_be,
    non_negative_int,
    number,
    one_of,
    positive_int,
    positive_number,
    set_field,
    unicode_text,
    validated,
)

if TYPE_CHECKING:
    from gpt2jax.lora.config import LoRAConfig
    from gpt2jax.model.config import GPT2Config
    from gpt2jax.tokenizer.bpe import Tokenizer

DEFAULT_NEW_TOKENS = 64
MAX_TOP_LOGPROBS = 20
MAX_COUNT = 1 << 16  # of beams, of continuations of a prompt, of drafted tokens


class DecoderModel(Protocol):
    """What generation needs of a model; `LanguageModel` has it."""

    @property
    def config(self) -> GPT2Config: ...
    @property
    def params(self) -> dict[str, Any]: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def adapters(self) -> dict[str, Any] | None: ...
    @property
    def lora(self) -> LoRAConfig | None: ...


def _strings(values: Any) -> tuple[str, ...]:
    values = () if values is None else (values,) if isinstance(values, str) else values
    return each(unicode_text).convert(values)


def _words(values: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(values, bytes | Mapping | set | frozenset):
        raise ValueError
    values = () if values is None else (values,) if isinstance(values, str) else tuple(values)
    words = tuple(word if isinstance(word, str) else each(non_negative_int).convert(word) for word in values)
    if not all(words):
        raise ValueError
    return words


def _accepts(test: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not test(value):
            raise ValueError
        return value

    return convert


_texts = Rule("a text or a list of texts, in Unicode and none of them empty", _strings)
# larger ones fill the memory of any device before the first token
_count, _count_or_none = int_in_range(1, MAX_COUNT), int_in_range(0, MAX_COUNT)
_texts_or_ids = Rule("a list of texts or of lists of token ids, none of them empty", _words)
_processor = Rule("a function of logits and token history", _accepts(callable))
_model = Rule(
    "a model such as gpt2jax.load(name) returns",
    _accepts(lambda x: hasattr(x, "config") and hasattr(x, "params")),
)

# a setting that one way of decoding would ignore must not be given with it
_SAMPLING = ("temperature", "top_p", "min_p", "typical_p")
_SPECULATION = ("prompt_lookup_num_tokens", "draft_model", "num_draft_tokens")
_EXCLUDES = {
    "max_length": ("max_new_tokens",),
    "min_length": ("min_new_tokens",),
    "prompt_lookup_num_tokens": ("draft_model", "num_draft_tokens"),
    "penalty_alpha": (*_SAMPLING, "num_return_sequences", *_SPECULATION),
    "num_beams": (
        *_SAMPLING,
        "top_k",
        "presence_penalty",
        "frequency_penalty",
        "logits_processor",
        "stop_strings",
        "top_logprobs",
        *_SPECULATION,
        "penalty_alpha",
        "overflow",
    ),
}


@validated
@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How texts are continued: by sampling, unless num_beams or penalty_alpha asks for a search.

    The logits pass these stages in order: repetition, frequency and presence penalty; forbidden tokens; the logits
    processor; the temperature; then the filters top_k, top_p, min_p, typical_p. Each filter keeps tokens of those that
    the filter before it kept, with their probabilities scaled to a sum of 1, and all but typical_p keep the most
    probable token. Of equally probable tokens the lowest ids are kept.

    Attributes:
        max_new_tokens: most tokens to add. Default: 64, or what is left of the context if that is less.
        max_length: most tokens of prompt and continuation together; instead of max_new_tokens.
        min_new_tokens: a continuation has at least this many tokens before a stop token.
        min_length: prompt and continuation together have at least this many; instead of min_new_tokens.
        do_sample: draw tokens at random; otherwise always take the most probable one (greedy).
        temperature: divides the logits: below 1 sharpens the distribution, above 1 flattens it, 0 is greedy.
        top_k: keep this many of the most probable tokens; None or 0 keeps all.
        top_p: keep the most probable tokens until their probabilities sum to this; 1 keeps all.
        min_p: keep tokens with at least this fraction of the highest probability; 0 keeps all.
        typical_p: keep the tokens whose information is nearest to the entropy until their probabilities sum to
            this; all of them for 1.
        repetition_penalty: logits of all tokens in prompt and continuation are divided by it if positive, multiplied
            if negative; 1 is off.
        presence_penalty: subtracted from the logits of tokens in the continuation; 0 is off.
        frequency_penalty: the same, once for every time that the token occurs; 0 is off.
        no_repeat_ngram_size: no n-gram of this many tokens occurs twice in prompt and continuation; 0 is off.
        bad_words: texts (or lists of token ids) that a continuation must not contain. A text is forbidden as the tokens
            that it has alone and after a space.
        logits_processor: a pure function of JAX arrays, (logits [B, V] float32, `TokenHistory`) to logits [B, V].
            Another function object compiles anew.
        num_return_sequences: continuations of each prompt.
        stop_token_ids: tokens that end a continuation. Default: the end-of-text token; an empty list never stops.
        stop_strings: texts that end a continuation and are cut off.
        top_logprobs: how many of the most probable tokens to report at each step, with their log-probabilities.
        prompt_lookup_num_tokens: speculative decoding: draft up to this many tokens at a time from an earlier
            occurrence of the last words. The continuation stays the same, repetitive texts are faster; 0 is off.
        draft_model: speculative decoding: a smaller model with the same vocabulary drafts tokens. The continuation
            stays the same.
        num_draft_tokens: how many tokens the draft model drafts at a time.
        penalty_alpha: contrastive search among the top_k tokens: the weight, up to 1, of being unlike the text so far.
            Su et al. (2022) use 0.6 with a top_k of 4 to 10; 0 is off.
        num_beams: beam search with this many beams finds probable continuations without sampling; 1 is off.
        length_penalty: beam search: scores are divided by the length to this power, so above 0 prefers longer
            continuations, below 0 shorter ones.
        early_stopping: beam search: True ends with num_beams finished continuations; False when no live one scores
            better at its present length; "never" when none could score better at any length.
        overflow: what happens when prompt and continuation exceed the context: "error" raises, "sliding_window" goes
            on from the last half of the text each time that the context is full.

    Raises:
        ValueError: a field is not legal, or two fields exclude each other.
        TypeError: a field does not exist.
    """

    max_new_tokens: Annotated[int | None, positive_int] = None
    max_length: Annotated[int | None, positive_int] = None
    min_new_tokens: Annotated[int, non_negative_int] = 0
    min_length: Annotated[int, non_negative_int] = 0
    do_sample: bool = True
    temperature: Annotated[float, in_range(0)] = 1.0
    top_k: Annotated[int | None, non_negative_int] = 5
    top_p: Annotated[float, in_range(0, 1, open_start=True)] = 1.0
    min_p: Annotated[float, in_range(0, 1)] = 0.0
    typical_p: Annotated[float, in_range(0, 1, open_start=True)] = 1.0
    repetition_penalty: Annotated[float, positive_number] = 1.0
    presence_penalty: Annotated[float, number] = 0.0
    frequency_penalty: Annotated[float, number] = 0.0
    no_repeat_ngram_size: Annotated[int, non_negative_int] = 0
    bad_words: Annotated[Sequence[str | Sequence[int]], _texts_or_ids] = ()
    logits_processor: Annotated[Callable[..., Any] | None, _processor] = None
    num_return_sequences: Annotated[int, _count] = 1
    stop_token_ids: Annotated[Sequence[int] | None, each(non_negative_int)] = None
    stop_strings: Annotated[str | Sequence[str], _texts] = ()
    top_logprobs: Annotated[int, int_in_range(0, MAX_TOP_LOGPROBS)] = 0
    prompt_lookup_num_tokens: Annotated[int, _count_or_none] = 0
    # two models are not compared: their parameters are arrays
    draft_model: Annotated[DecoderModel | None, _model] = dataclasses.field(default=None, compare=False)
    num_draft_tokens: Annotated[int, _count] = 4
    penalty_alpha: Annotated[float, in_range(0, 1)] = 0.0
    num_beams: Annotated[int, _count] = 1
    length_penalty: Annotated[float, number] = 1.0
    early_stopping: Annotated[bool | Literal["never"], one_of((True, False, "never"))] = False
    overflow: Literal["error", "sliding_window"] = "error"

    def __post_init__(self) -> None:
        if self.top_k == 0:  # as in transformers
            set_field(self, "top_k", None)
        given = _changed({name: getattr(self, name) for name in field_names(type(self))})
        for name, others in _EXCLUDES.items():
            ignored = [other for other in others if other in given]
            if name in given and ignored:
                raise ValueError(f"{name}={getattr(self, name)!r} does not go with {', '.join(ignored)}")
        for name in ("length_penalty", "early_stopping"):
            if name in given and self.num_beams == 1:
                raise ValueError(f"{name}={getattr(self, name)!r} needs beam search; give num_beams above 1")
        if self.penalty_alpha and self.top_k is None:
            legal = f"the number of candidates with penalty_alpha={self.penalty_alpha:g}"
            raise ValueError(must_be("top_k", legal, self.top_k))
        if 1 < self.num_beams < self.num_return_sequences:
            legal = f"at most num_beams={self.num_beams}"
            raise ValueError(must_be("num_return_sequences", legal, self.num_return_sequences))


def is_greedy(config: GenerationConfig) -> bool:
    """Return whether the settings always take the most probable token."""
    return not config.do_sample or config.temperature == 0 or config.top_k == 1


# each row of a call may have its own value of these; all rows of a call share the others
ROW_FIELDS = (
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "min_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
)


def resolve_configs(
    config: GenerationConfig | Sequence[GenerationConfig] | None,
    overrides: Mapping[str, Any],
    num_prompts: int,
    *,
    is_search: bool = False,
) -> tuple[GenerationConfig, list[GenerationConfig]]:
    """Merge a config, or one for each row, with overrides.

    Args:
        config: None stands for `GenerationConfig()`.
        overrides: fields of `GenerationConfig`, or `eos_token_id`, transformers' name of `stop_token_ids`. A list for
            one of `ROW_FIELDS` has one value for each row.
        num_prompts: a prompt has `num_return_sequences` rows, in beam search one row.
        is_search: beam search, also with one beam.

    Returns:
        The config of what all rows share, and the config of each row.

    Raises:
        ValueError: a value is not legal, or the number of values is not the number of rows.
        TypeError: there is no such setting.
    """
    known = [field.name for field in dataclasses.fields(GenerationConfig)]
    overrides = {name: _plain(value) if name in ROW_FIELDS else value for name, value in overrides.items()}
    if "eos_token_id" in overrides:
        if "stop_token_ids" in overrides:
            raise ValueError(
                "eos_token_id does not go with stop_token_ids; they are two names of one setting"
            )
        end = overrides.pop("eos_token_id")
        overrides["stop_token_ids"] = [end] if is_integer(end) else end
    check_names("setting", overrides, known)
    by_row = {k: v for k, v in overrides.items() if k in ROW_FIELDS and isinstance(v, list | tuple)}
    shared: dict[str, Any] = {name: value for name, value in overrides.items() if name not in by_row}
    given: Any = list(config) if isinstance(config, list | tuple) else [config or GenerationConfig()]
    if not given or not all(isinstance(item, GenerationConfig) for item in given):
        raise ValueError(must_be("config", "a GenerationConfig or a list of them, one for each row", config))
    configs: list[GenerationConfig] = [dataclasses.replace(item, **shared) for item in given]
    first = configs[0]
    rows = num_prompts * (1 if is_search or first.num_beams > 1 else first.num_return_sequences)
    for name, values in {**by_row, **({"config": given} if isinstance(config, list | tuple) else {})}.items():
        if len(values) != rows:
            raise ValueError(
                f"{name} must be one value or {rows} values, one for each row, got {len(values)}"
            )
    for name in set(known) - set(ROW_FIELDS):
        if any(not _is_same(getattr(item, name), getattr(first, name)) for item in configs):
            raise ValueError(f"{name} must be the same in the configs of all rows")
    configs = configs if len(configs) == rows else configs * rows
    if by_row:
        configs = [
            dataclasses.replace(item, **{name: values[row] for name, values in by_row.items()})
            for row, item in enumerate(configs)
        ]
    return first, configs


def excluded_by(settings: Mapping[str, Any]) -> set[str]:
    """Return the settings that must not be given with these."""
    given = _changed(settings)
    excluded = {other for name in given for other in _EXCLUDES.get(name, ())}
    return excluded | {name for name, others in _EXCLUDES.items() if given.intersection(others)}


def _changed(settings: Mapping[str, Any]) -> set[str]:
    """Return the names of settings that do not have their default."""
    defaults = {field.name: field.default for field in dataclasses.fields(GenerationConfig)}
    return {name for name, value in settings.items() if not _is_same(value, defaults.get(name))}


def _is_same(a: Any, b: Any) -> bool:
    # functions and models are the same only if they are the same object
    plain = isinstance(a, int | float | str | tuple)
    return type(a) is type(b) and a == b if plain else a is b


def _plain(values: Any) -> Any:
    """Return an array as a list of Python numbers."""
    return values.tolist() if hasattr(values, "tolist") else values


def as_list(values: Any) -> list[Any] | None:
    """Return an array or another iterable as a list of Python values; None for a text and for a single value."""
    values = _plain(values)
    is_list = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | set | frozenset)
    return list(values) if is_list else None
