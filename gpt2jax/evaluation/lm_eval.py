"""Registers gpt2jax as a model of lm-evaluation-harness, under the name "gpt2jax".

    import lm_eval
    from gpt2jax.evaluation.lm_eval import HarnessModel

    lm_eval.simple_evaluate(model=HarnessModel(gpt2jax.load("gpt2-mini")), tasks=["lambada_openai"])
    lm_eval.simple_evaluate(model="gpt2jax", model_args="model=gpt2-mini", tasks=["lambada_openai"])

and on the command line `python -m gpt2jax.evaluation.lm_eval run --model gpt2jax --model_args model=gpt2-mini
--tasks lambada_openai`. Importing this module imports lm_eval; nothing else in the package does. Texts are generated as
a task says; generation_config.json beside the weights has no effect.

Source: https://github.com/EleutherAI/lm-evaluation-harness, version 0.4.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "lm_eval":
        raise
    problem = "gpt2jax.evaluation.lm_eval needs lm-evaluation-harness: pip install lm-eval"
    if __name__ == "__main__":
        print(f"gpt2jax lm_eval: error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    raise ModuleNotFoundError(problem, name="lm_eval") from None

from gpt2jax.data.documents import Documents
from gpt2jax.data.tokenization import tokenize_documents
from gpt2jax.evaluation.accumulators import TokenScores, sum_by_document
from gpt2jax.evaluation.scoring import Scorer, score_windows
from gpt2jax.evaluation.windows import Windows, plan_rolling_windows
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.generation.generate import generate
from gpt2jax.language_model import LanguageModel
from gpt2jax.loading import load
from gpt2jax.tokenizer.bpe import END_TOKEN, Tokenizer
from gpt2jax.utils.jax_switches import default_switches
from gpt2jax.utils.validation import check, int_in_range, must_be, positive_int
from gpt2jax.utils.validation import seed as seed_rule

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "do_sample")


@register_model("gpt2jax")
class HarnessModel(TemplateLM):
    """A GPT-2 that answers the requests of lm-evaluation-harness.

    Args:
        model: a `LanguageModel` with a tokenizer, or what `load` takes.
        batch_size: rows at once; "auto" is 32.
        max_length: the longest input in tokens; default: the model's context.
        max_gen_toks: new tokens of a task that does not say how many.
        compute_dtype: of the matrix products.
        seed: of the tasks that sample.
        max_batch_size, device: ignored; the harness passes them. jax chooses the device.
    """

    def __init__(
        self,
        model: LanguageModel | str = "gpt2-mini",
        batch_size: int | str = 32,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        compute_dtype: str = "float32",
        seed: int = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.model = load(model) if isinstance(model, str) else model
        if self.model.tokenizer is None:
            raise ValueError(must_be("model", "a model with a tokenizer", model) + "; tasks consist of texts")
        context = self.model.config.n_positions
        self.max_length = context
        if max_length is not None:
            self.max_length = check("max_length", _to_int(max_length), int_in_range(1, context))
        self.batch_size = 32 if str(batch_size).startswith("auto") else _count("batch_size", batch_size)
        self.max_gen_toks = _count("max_gen_toks", max_gen_toks)
        self.compute_dtype, self.seed = compute_dtype, check("seed", seed, seed_rule)
        self._scorer = Scorer(self.model, compute_dtype)

    @property
    def _tokenizer(self) -> Tokenizer:
        assert self.model.tokenizer is not None
        return self.model.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The end token, which goes in front of a text without context."""
        return self.model.end_token_id

    @property
    def tokenizer_name(self) -> str:
        """Name that identifies the tokenizer in the harness's cache of requests."""
        return f"gpt2jax-{self._tokenizer.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text, without an end token."""
        return self._tokenizer.encode(string)

    @default_switches()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation after its context, and whether greedy decoding gives it."""
        if not requests:
            return []
        documents = self._documents([context + continuation for _, context, continuation in requests])
        contexts = np.array([len(context) for _, context, _ in requests])
        too_long = np.flatnonzero(documents.lengths - contexts > self.max_length)
        if len(too_long):
            index = int(too_long[0])
            raise ValueError(
                f"request {index} continues with {documents.lengths[index] - contexts[index]} tokens; at most "
                f"{self.max_length} fit the context"
            )
        # label j of a document is predicted from its token j - 1: from the second on, and the last that fit
        begin = np.maximum(documents.lengths - self.max_length, 1)
        windows = Windows(
            np.arange(len(documents)),
            begin,
            documents.lengths,
            np.maximum(contexts, begin),
            documents.offsets,
        )
        scores = self._run(documents, windows)
        found = []
        for start, end, context in zip(scores.offsets[:-1], scores.offsets[1:], contexts, strict=True):
            mine = slice(int(start) + int(context), int(end))
            loss = float(scores.loss[mine].sum(dtype=np.float64))
            found.append((0.0 - loss, bool((scores.rank[mine] == 0).all())))
        for (strings, _, _), answer in zip(requests, found, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return found

    @default_switches()
    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, in the windows of `evaluate(windows="rolling")`."""
        if not requests:
            return []
        documents = self._documents(
            [self.tok_encode(text) for (text,) in (request.args for request in requests)]
        )
        scores = self._run(documents, plan_rolling_windows(documents, self.max_length))
        answers = (0.0 - sum_by_document(scores.loss, scores.offsets)).tolist()  # 0, not -0, of nothing
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context up to one of its stop strings; greedy unless the task samples."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        for indices in groups.values():
            until, most, sampling = self._generation_settings(requests[indices[0]].args[1])
            room = self.max_length - most
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={most} leaves no room for a prompt in {self.max_length} tokens"
                )
            prompts = [self.tok_encode(requests[index].args[0])[-room:] for index in indices]
            outputs = generate(
                self.model,
                prompts,
                # a config counts alone: a task's figures must not depend on a generation_config.json
                GenerationConfig(max_new_tokens=most, stop_strings=until, **sampling),
                dtype=self.compute_dtype,
                batch_size=self.batch_size,
                seed=self.seed,
            )
            for index, output in zip(indices, outputs, strict=True):
                answers[index] = output.text
                self.cache_hook.add_partial("generate_until", requests[index].args, output.text)
        return answers

    def _generation_settings(self, settings: Mapping[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
        """Return stop strings, number of new tokens and sampling of a task's settings."""
        rest = dict(settings)
        until = rest.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        most = int(rest.pop("max_gen_toks", self.max_gen_toks))
        sampling = {name: rest.pop(name) for name in SAMPLING if name in rest}
        if rest:
            raise ValueError(f"the task's generation_kwargs have {', '.join(rest)}; known: until, max_gen_toks, "
                             f"{', '.join(SAMPLING)}")  # fmt: skip
        if not sampling.get("temperature", 1.0):
            sampling = {}
        return [*until, END_TOKEN], most, {"do_sample": False, "top_k": None} | sampling

    def _documents(self, rows: Sequence[list[int]]) -> Documents:
        return tokenize_documents(rows, self._tokenizer, vocab_size=self.model.config.vocab_size)

    def _run(self, documents: Documents, windows: Windows) -> TokenScores:
        return score_windows(
            self._scorer,
            documents,
            windows,
            sequence_length=self.max_length,
            batch_size=self.batch_size,
            end_token_id=self.eot_token_id,
        )


def _count(name: str, value: Any) -> int:
    """Return a positive whole number, which the harness's command line may give as text."""
    return check(name, _to_int(value), positive_int)


def _to_int(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
