"""`Generator`: a model ready to generate; it owns the weights as decoding reads them."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt2jax.generation.beam_search import search_prompts
from gpt2jax.generation.cached_model import (
    DecodingParams,
    decoding_precision,
    prepare_model,
    weight_dtype,
)
from gpt2jax.generation.config import DecoderModel, GenerationConfig
from gpt2jax.generation.contrastive import ContrastiveSearch
from gpt2jax.generation.decoding import DecoderSpec
from gpt2jax.generation.outputs import Generation, OutputBuilder
from gpt2jax.generation.requests import Prompt, Request, as_prompts, make_request
from gpt2jax.generation.row_sharding import first_copy, is_on_one_device, replicate, row_mesh
from gpt2jax.generation.runner import Decoder, decode_rows
from gpt2jax.generation.speculative import DraftModel, PromptLookup
from gpt2jax.generation.stages import make_stages
from gpt2jax.generation.strategy import DecodeStrategy, Sampling
from gpt2jax.utils.jax_switches import default_switches
from gpt2jax.utils.validation import check, check_model, must_be, positive_int

# steps between searches for a stop string: few are wasted, and the host seldom waits for the device
STEPS_PER_STOP_CHECK = 8
DEFAULT_BEAMS = 4


class WeightCache:
    """The prepared weights of the model that was asked for last; keeps no model alive."""

    def __init__(self) -> None:
        self._entry: tuple[Callable[[], Any], jnp.dtype, list[weakref.ref], DecodingParams] | None = None
        self._replicated: tuple[Mesh, DecodingParams] | None = None

    def get(self, model: DecoderModel, dtype: jnp.dtype) -> DecodingParams:
        """Return the weights of a model, prepared anew if it is another one or its arrays have been replaced."""
        leaves = jax.tree.leaves((model.params, model.adapters))
        if self._entry is not None:
            known, known_dtype, arrays, params = self._entry
            is_known = known() is model and known_dtype == dtype and len(arrays) == len(leaves)
            if is_known and all(array() is leaf for array, leaf in zip(arrays, leaves, strict=True)):
                return params
        self.clear()  # first, so that two models' weights need not fit the memory
        params = prepare_model(model, dtype)
        try:
            known = weakref.ref(model, self._forget)
        except TypeError:  # not every object can be referenced weakly
            known = functools.partial(lambda x: x, model)
        self._entry = (known, dtype, [weakref.ref(x) for x in leaves], params)
        return params

    def get_replicated(self, model: DecoderModel, dtype: jnp.dtype, mesh: Mesh) -> DecodingParams:
        """Return the weights of a model on each device of a mesh."""
        params = self.get(model, dtype)
        if self._replicated is None or self._replicated[0] != mesh:
            self._replicated = mesh, replicate(params, mesh)
            # the first device need not hold them twice
            self._entry = (*self._entry[:3], first_copy(self._replicated[1]))  # type: ignore[index]
        return self._replicated[1]

    def clear(self) -> None:
        """Free the weights."""
        self._entry = self._replicated = None

    def _forget(self, model: weakref.ref) -> None:
        if self._entry is not None and self._entry[0] is model:
            self.clear()


@dataclasses.dataclass(frozen=True)
class DecoderWeights:
    """The prepared weights of a model and of its draft model."""

    model: WeightCache = dataclasses.field(default_factory=WeightCache)
    draft: WeightCache = dataclasses.field(default_factory=WeightCache)


class Generator:
    """Continues prompts with one model, whose weights it prepares once, at the first call.

        with Generator(model, dtype="int8") as generator:
            outputs = generator.generate(prompts, config)

    Args:
        model: a `LanguageModel`.
        dtype: of the weights: "float32", "bfloat16", "float16" or "int8". Default: float32 on a CPU, bfloat16
            elsewhere.
        weights: prepared weights to share with other generators.

    Raises:
        ValueError: `model` is not a model, or `dtype` is not one of these.
    """

    def __init__(
        self, model: DecoderModel, *, dtype: str | None = None, weights: DecoderWeights | None = None
    ):
        check_model("model", model)
        self.model = model
        self._precision = decoding_precision(dtype)
        self._dtype = weight_dtype(dtype, self._precision)
        self._weights: DecoderWeights | None = weights or DecoderWeights()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the prepared weights; the generator cannot be used afterwards."""
        self._weights = None

    @default_switches()
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        seed: int | Sequence[int] = 0,
        batch_size: int = 32,
        **overrides: Any,
    ) -> list[Generation]:
        """Continue prompts; see `gpt2jax.generate`."""
        batch_size = check("batch_size", batch_size, positive_int)
        request = make_request(self.model, prompts, config, overrides, seed)
        if request.config.num_beams > 1:
            return [beam for beams in self._search(request, batch_size) for beam in beams]
        decoder = self._decoder(request, batch_size)
        steps = STEPS_PER_STOP_CHECK if request.stop_strings else self.model.config.n_positions
        found: dict[int, Generation] = {}
        for indices in _batches(decoder, request, batch_size):
            outputs = [OutputBuilder(request, request.rows[i]) for i in indices]
            for _ in decode_rows(decoder, request, outputs, steps):
                pass
            found.update((i, output.result()) for i, output in zip(indices, outputs, strict=True))
        return [found[i] for i in range(len(request.rows))]

    @default_switches()
    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        seed: int = 0,
        **overrides: Any,
    ) -> Stream:
        """Continue one prompt and yield its text as it comes; see `gpt2jax.stream`."""
        if self.model.tokenizer is None:
            raise ValueError(
                "stream yields text, and this model has no tokenizer; name one with load(..., tokenizer=...), in the "
                "commands with --tokenizer, or use generate for token ids"
            )
        prompts = as_prompts(prompt)
        if len(prompts) != 1:
            raise ValueError(f"stream takes one prompt, got {len(prompts)}; use generate for several")
        request = make_request(self.model, prompts, config, overrides, seed)
        for name in ("num_beams", "num_return_sequences"):
            if getattr(request.config, name) != 1:
                raise ValueError(
                    f"{must_be(name, '1 for a stream', getattr(request.config, name))}; use generate"
                )
        return Stream(self._decoder(request), request)

    @default_switches()
    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        batch_size: int = 32,
        **overrides: Any,
    ) -> list[list[Generation]]:
        """Return the beams of each prompt; see `gpt2jax.beam_search`."""
        batch_size = check("batch_size", batch_size, positive_int)
        if config is None:
            overrides = {"num_beams": DEFAULT_BEAMS, **overrides}
        return self._search(make_request(self.model, prompts, config, overrides, is_search=True), batch_size)

    def _search(self, request: Request, batch_size: int) -> list[list[Generation]]:
        rows = request.rows
        spec, params = self._spec(request), self._prepared()
        found: dict[int, list[Generation]] = {}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].token_ids))
        together = max(1, batch_size // request.config.num_beams)
        for start in range(0, len(rows), together):
            indices = order[start : start + together]
            found.update(
                zip(indices, search_prompts(spec, params, request, [rows[i] for i in indices]), strict=True)
            )
        return [found[i] for i in range(len(rows))]

    def _decoder(self, request: Request, batch_size: int = 1) -> Decoder:
        strategy, draft = choose_strategy(request), request.config.draft_model
        params: Any = self._prepared()
        spec = self._spec(request)
        if draft is not None:
            params = params, self._opened().draft.get(draft, self._dtype)
        elif isinstance(strategy, Sampling) and min(batch_size, len(request.rows)) > 1:
            mesh = row_mesh() if is_on_one_device(params) else None
            if mesh is not None:
                spec = dataclasses.replace(spec, mesh=mesh)
                params = self._opened().model.get_replicated(self.model, self._dtype, mesh)
        return Decoder(strategy, spec, params)

    def _spec(self, request: Request) -> DecoderSpec:
        """Return what the programs of a call are compiled for, on one device."""
        config = self.model.config
        stages = None
        if self._precision.execution.platform != "cpu":
            configs = [row.config for row in request.rows]
            stages = make_stages(configs, has_bad_words=bool(request.bad_words), vocab_size=config.vocab_size)
        return DecoderSpec(config, self._precision, request.config.logits_processor, stages)

    def _prepared(self) -> DecodingParams:
        return self._opened().model.get(self.model, self._dtype)

    def _opened(self) -> DecoderWeights:
        if self._weights is None:
            raise ValueError("the generator is closed; make another one with Generator(model)")
        return self._weights


class Stream(Iterator[str]):
    """The pieces of a text as they come.

    Attributes:
        generation: what `generate` returns for the prompt, after the last piece; None before.
    """

    def __init__(self, decoder: Decoder, request: Request):
        self._output = OutputBuilder(request, request.rows[0])
        self._steps = decode_rows(decoder, request, [self._output], 1, is_ahead=True)
        self._text = ""
        self.generation: Generation | None = None

    @default_switches()
    def __next__(self) -> str:
        for _ in self._steps:
            piece = self._output.text.flush(last=self._output.finish_reason is not None)
            if piece:
                self._text += piece
                return piece
        if self.generation is None:
            self.generation = dataclasses.replace(self._output.result(), text=self._text)
        raise StopIteration


def choose_strategy(request: Request) -> DecodeStrategy:
    """Return the strategy that a config asks for.

    Raises:
        ValueError: it does not fit the model.
    """
    config, vocab_size = request.config, request.model.config.vocab_size
    if config.penalty_alpha:
        choices = {row.config.top_k for row in request.rows} or {config.top_k}
        top_k = choices.pop()
        if choices or top_k is None or top_k > vocab_size:
            legal = (
                f"one number of candidates from 1 to {vocab_size} with penalty_alpha={config.penalty_alpha:g}"
            )
            raise ValueError(must_be("top_k", legal, [top_k, *choices] if choices else top_k))
        return ContrastiveSearch(top_k)
    if config.draft_model is not None:
        draft = config.draft_model.config
        if draft.vocab_size != vocab_size:
            legal = f"a model with the {vocab_size} ids of the model that it drafts for"
            raise ValueError(f"draft_model must be {legal}, got one with {draft.vocab_size} ids")
        return DraftModel(config.num_draft_tokens, draft)
    if config.prompt_lookup_num_tokens:
        return PromptLookup(config.prompt_lookup_num_tokens)
    return Sampling()


def _batches(decoder: Decoder, request: Request, batch_size: int) -> Iterator[list[int]]:
    """Yield the rows that run together; those of similar length, which need the least padding."""
    rows, context = request.rows, decoder.spec.config.n_positions
    batch_size = min(batch_size, decoder.strategy.max_rows or batch_size)

    def is_sliding(i: int) -> bool:
        return rows[i].limit + len(rows[i].token_ids) > context

    order = sorted(range(len(rows)), key=lambda i: len(rows[i].token_ids))
    yield from ([i] for i in order if is_sliding(i))
    together = [i for i in order if not is_sliding(i)]
    yield from (together[start : start + batch_size] for start in range(0, len(together), batch_size))
