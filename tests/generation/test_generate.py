"""Generation against naive loops over the plain forward pass, and everything a user can ask for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_models import CONFIG, END, LONG, TOKENIZER, model_of, speller, steep_model

from gpt2jax.generation.config import GenerationConfig
from gpt2jax.generation.generate import beam_search, generate, stream
from gpt2jax.generation.outputs import Generation
from gpt2jax.generation.sampling import log_probability, make_filters, sample
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import hidden_states, lm_head_weight, output_logits
from gpt2jax.tokenizer.end_tokens import find_end_token

PROMPTS = ["a", "", "hello world", LONG]


@pytest.fixture(scope="module")
def model():
    return steep_model()


draw = jax.jit(sample)


@jax.jit
def all_logits(params, ids):
    return output_logits(hidden_states(params, CONFIG, ids), lm_head_weight(params))


def naive(model, prompt, *, seed=0, max_new_tokens=12, stop=(END,), **settings):
    """One token at a time, each from the logits of the whole text, padded at the right."""
    filters = make_filters(GenerationConfig(**settings))
    ids = list(TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt) or [END]
    tokens, logprobs = [], []
    for step in range(max_new_tokens):
        context = ids + tokens
        padded = np.array([context + [0] * (64 - len(context))])
        logits = all_logits(model.params, padded)[:, len(context) - 1]
        key = jax.random.fold_in(jax.random.key(seed), step)[None]
        token = draw(logits, key, filters)
        logprob = log_probability(logits, token)
        if int(token[0]) in stop:
            break
        tokens.append(int(token[0]))
        logprobs.append(float(logprob[0]))
    return tokens, logprobs


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"top_k": 5},
        {"top_k": 40, "temperature": 0.8, "top_p": 0.9},
        {"top_k": None, "top_p": 0.8},
    ],
    ids=str,
)
def test_ragged_batch_equals_naive_loops(model, settings):
    """Rows of 0 to 23 tokens in one batch: tokens and log-probabilities of each are a naive loop's."""
    outputs = generate(model, PROMPTS, max_new_tokens=12, seed=7, **settings)
    for i, (prompt, output) in enumerate(zip(PROMPTS, outputs, strict=True)):
        tokens, logprobs = naive(model, prompt, seed=7 + i, **settings)
        assert output.token_ids == tokens
        np.testing.assert_allclose(output.logprobs, logprobs, atol=1e-4)
        assert output.prompt == prompt
        assert output.text == TOKENIZER.decode(tokens)
        assert str(output) == prompt + output.text
        assert output.finish_reason == ("length" if len(tokens) == 12 else "stop")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"do_sample": False}, {}], ids=str)
def test_a_row_equals_its_single_run(model, settings):
    together = generate(model, PROMPTS, max_new_tokens=10, seed=3, **settings)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = generate(model, prompt, max_new_tokens=10, seed=3 + i, **settings)
        assert alone.token_ids == together[i].token_ids
        np.testing.assert_allclose(alone.logprobs, together[i].logprobs, atol=1e-4)
        assert (alone.text, alone.finish_reason) == (together[i].text, together[i].finish_reason)


@pytest.mark.slow
def test_batch_size_changes_nothing(model):
    together = generate(model, PROMPTS, max_new_tokens=10, seed=3)
    in_parts = generate(model, PROMPTS, max_new_tokens=10, seed=3, batch_size=1)
    assert [out.token_ids for out in in_parts] == [out.token_ids for out in together]


def test_samples_of_a_prompt_follow_each_other_and_differ(model):
    outputs = generate(model, [LONG, "hello"], max_new_tokens=10, num_return_sequences=2, seed=5)
    assert [out.prompt for out in outputs] == [LONG, LONG, "hello", "hello"]
    assert outputs[0].token_ids != outputs[1].token_ids
    for j in (0, 1):
        (alone,) = generate(model, "hello", max_new_tokens=10, seed=5 + 2 + j)
        assert outputs[2 + j].token_ids == alone.token_ids


def test_seeds(model):
    def run(seed):
        outputs = generate(model, ["a", "a", "a", LONG], max_new_tokens=10, seed=seed)
        return [out.token_ids for out in outputs]

    first = run(1)
    assert run(1) == first
    assert first[0] != first[1]  # the same prompt twice is not the same sample twice
    assert run(100)[:3] != first[:3]
    assert run([3, 2, 1, 0])[:3] == first[2::-1]
    assert run(np.array([1, 1, 5, 5]))[1] == first[0]
    assert run(2**32 - 1)[1] == run(0)[0]  # seeds go round


@pytest.mark.slow
def test_ids_zero_and_end_are_ordinary_in_a_prompt(model):
    for prompt in ([0], [0, 0, 5], [END, 0, END], [END, END], [7, END]):
        (output,) = generate(model, [prompt], max_new_tokens=8, do_sample=False)
        assert output.token_ids == naive(model, prompt, do_sample=False, max_new_tokens=8)[0]
        assert output.prompt_ids == prompt
        assert output.prompt == TOKENIZER.decode(prompt)


def test_empty_prompt_begins_behind_the_end_token(model):
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    outputs = [generate(model, prompt, **settings)[0] for prompt in ("", [[]], [[END]])]
    assert len({tuple(out.token_ids) for out in outputs}) == 1
    assert outputs[0].prompt_ids == outputs[1].prompt_ids == [END]
    assert outputs[0].prompt == outputs[1].prompt == ""
    assert generate(model, []) == []


def test_ways_to_give_prompts(model):
    ids = TOKENIZER.encode("hello")
    settings: dict[str, Any] = {"max_new_tokens": 4, "seed": 2}
    lists = [ids, [ids], tuple(ids), np.array(ids), np.array([ids]), [jnp.array(ids)]]
    ways = ["hello", ["hello"], ("hello",), *lists]
    outputs = [generate(model, way, **settings) for way in ways]
    assert all(out == outputs[0] for out in outputs)
    assert isinstance(outputs[0], list) and isinstance(outputs[0][0], Generation)
    assert all(type(token) is int for token in outputs[0][0].prompt_ids + outputs[0][0].token_ids)


def test_without_a_tokenizer(model):
    bare = model_of(CONFIG, model.params, None)
    ids = TOKENIZER.encode("hello")
    (output,) = generate(bare, [ids], max_new_tokens=6, seed=1)
    (with_text,) = generate(model, "hello", max_new_tokens=6, seed=1)
    assert output.token_ids == with_text.token_ids
    assert (output.text, output.prompt, str(output)) == ("", "", "")
    for call in (lambda: generate(bare, "hello"), lambda: stream(bare, ids)):
        with pytest.raises(ValueError, match="no tokenizer"):
            call()
    with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
        generate(bare, [ids], stop_strings="x")


# ---- where it ends ----


def test_lengths(model):
    (one,) = generate(model, "hello", max_new_tokens=1, stop_token_ids=[])
    assert len(one.token_ids) == len(one.logprobs) == 1 and one.finish_reason == "length"
    outputs = generate(model, [LONG, [1] * 15, [2] * 20, [3] * 17], max_length=30, stop_token_ids=[])
    assert [len(out.prompt_ids) + len(out.token_ids) for out in outputs] == [30] * 4
    (default,) = generate(model, [[1] * 60], stop_token_ids=[])
    assert len(default.token_ids) == 4  # as many as the context has left
    (whole,) = generate(model, [[1] * 60], max_length=64, stop_token_ids=[])
    assert whole.token_ids == default.token_ids
    assert whole.token_ids == naive(model, [1] * 60, max_new_tokens=4, stop=())[0]


def test_the_whole_context(model):
    """From one token to the last position."""
    (output,) = generate(model, [[5]], max_new_tokens=63, do_sample=False, stop_token_ids=[])
    assert output.token_ids == naive(model, [5], max_new_tokens=63, do_sample=False, stop=())[0]


@pytest.mark.slow
def test_stop_token_ids():
    text = [10, 11, END, 12, 13, 14]
    model = speller(text)

    def run(**settings):
        return generate(model, [[1]], max_new_tokens=6, do_sample=False, **settings)[0]

    default = run()
    assert (default.token_ids, default.finish_reason) == ([10, 11], "stop")
    assert default.text == TOKENIZER.decode([10, 11]) and len(default.logprobs) == 2
    never = run(stop_token_ids=[])
    assert (never.token_ids, never.finish_reason) == (text, "length")
    assert never.text == TOKENIZER.decode(text)
    assert run(stop_token_ids=[13, 200]).token_ids == [10, 11, END, 12]
    assert run(stop_token_ids=[10]).token_ids == [] and run(stop_token_ids=[10]).text == ""
    assert run(stop_token_ids=[14]).finish_reason == "stop"  # as the last token that was allowed
    assert run(stop_token_ids=range(12, 40)).token_ids == [10, 11, END]


@pytest.mark.slow
def test_rows_of_a_batch_end_on_their_own():
    """One row stops at its first token, one later, one never; the others' tokens are not touched by it."""
    text = [10, 11, 12, END, 13, 14, 15, 16]
    model = speller(text, prompt_length=4)  # shorter prompts enter the text later in their continuation
    outputs = generate(model, [[1] * 7, [1] * 4, [1] * 8], max_new_tokens=4, do_sample=False)
    assert [out.token_ids for out in outputs] == [[], [10, 11, 12], [13, 14, 15, 16]]
    assert [out.finish_reason for out in outputs] == ["stop", "stop", "length"]


# ---- more settings ----


@pytest.mark.slow
def test_top_logprobs(model):
    """Those of the model before penalties and filters, best first, of as many tokens as asked for."""
    (output,) = generate(model, "hello", max_new_tokens=5, top_logprobs=3, temperature=3.0, seed=2)
    assert output.top_logprobs is not None and len(output.top_logprobs) == 5
    ids = TOKENIZER.encode("hello") + output.token_ids
    logits = all_logits(model.params, np.array([ids + [0] * (64 - len(ids))]))[0]
    want = np.asarray(jax.nn.log_softmax(logits))[len(ids) - 6 : len(ids) - 1]
    for row, top, token, logprob in zip(
        want, output.top_logprobs, output.token_ids, output.logprobs, strict=True
    ):
        assert [i for i, _ in top] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([value for _, value in top], np.sort(row)[::-1][:3], atol=1e-4)
        np.testing.assert_allclose(logprob, row[token], atol=1e-4)
    assert generate(model, "hello", max_new_tokens=2)[0].top_logprobs is None


def test_a_list_gives_each_row_its_settings(model):
    settings: dict[str, Any] = {
        "temperature": [0.0, 2.0, 1.0],
        "top_k": [5, None, 40],
        "no_repeat_ngram_size": [1, 0, 2],
        "repetition_penalty": [1.0, 1.8, 1.0],
        "min_new_tokens": [0, 10, 3],
    }
    together = generate(model, PROMPTS[:3], max_new_tokens=12, seed=3, **settings)
    for i, prompt in enumerate(PROMPTS[:3]):
        own: Any = {name: values[i] for name, values in settings.items()}
        (alone,) = generate(model, prompt, max_new_tokens=12, seed=3 + i, **own)
        assert alone.token_ids == together[i].token_ids


@pytest.mark.slow
def test_a_processor_changes_logits(model):
    """It sees the text so far: here each token is one more than the one before."""

    def successor(logits, context):
        last = jnp.take_along_axis(context.token_ids, context.end[:, None] - 1, axis=1)
        return jnp.where(jnp.arange(logits.shape[-1]) == last + 1, 0.0, -jnp.inf)

    outputs = generate(model, [[7], [1, 40]], max_new_tokens=4, logits_processor=successor)
    assert [output.token_ids for output in outputs] == [[8, 9, 10, 11], [41, 42, 43, 44]]
    for wrong, given in ((lambda logits, _: logits[:, :5], r"\(1, 5\)"), (lambda *_: None, "NoneType")):
        with pytest.raises(
            ValueError, match=rf"logits_processor must return logits of shape \(1, 300\), got {given}"
        ):
            generate(model, [7], max_new_tokens=4, logits_processor=wrong)


def test_bad_words_and_least_length(model):
    (plain,) = generate(model, LONG, max_new_tokens=12, do_sample=False, stop_token_ids=[])
    first, second = plain.token_ids[:2]
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    for bad in ([[first]], [[first, second]], [[9, 9, 9], plain.token_ids[:3]]):
        (output,) = generate(model, LONG, bad_words=bad, stop_token_ids=[], **settings)
        text = output.token_ids
        assert text != plain.token_ids
        assert not any(text[i : i + len(word)] == word for word in bad for i in range(len(text)))
    (stopped,) = generate(model, LONG, stop_token_ids=[first, second], **settings)
    assert stopped.token_ids == []
    (longer,) = generate(model, LONG, stop_token_ids=[first, second], min_new_tokens=5, **settings)
    assert len(longer.token_ids) >= 5 and not {first, second} & set(longer.token_ids[:5])
    (worded,) = generate(model, LONG, bad_words=["a"], seed=1, max_new_tokens=30)
    assert TOKENIZER.encode("a")[0] not in worded.token_ids


@pytest.mark.slow
def test_with_64_bits_allowed_the_text_is_the_same(model):
    settings: dict[str, Any] = {"max_new_tokens": 6, "top_k": 50, "seed": 3, "prompt_lookup_num_tokens": 3}
    (plain,) = generate(model, "abcabc", **settings)
    with jax.enable_x64(True):
        (output,) = generate(model, "abcabc", **settings)
    assert output.token_ids == plain.token_ids


def test_any_large_number_is_one_that_is_never_reached(model):
    settings: dict[str, Any] = {"max_new_tokens": 3, "stop_token_ids": [], "top_k": 2**40}
    (output,) = generate(model, LONG, no_repeat_ngram_size=2**40, min_new_tokens=2**40, **settings)
    assert output.token_ids == generate(model, LONG, **settings)[0].token_ids


# ---- odd models ----


@pytest.mark.slow
def test_ids_without_text_are_never_drawn():
    """A vocabulary that is padded beyond its tokenizer: the padding's logits are the highest here."""
    model = speller([310, 10, 310], vocab_size=320)
    model.params["lm_head"]["kernel"] = model.params["lm_head"]["kernel"].at[315].set(20.0)
    (output,) = generate(model, [[1]], max_new_tokens=3, do_sample=False, stop_token_ids=[])
    assert max(output.token_ids) < 300
    assert output.token_ids[1] == 10


def test_end_token_of_a_padded_vocabulary():
    config = GPT2Config(vocab_size=320)
    assert config.eos_token_id == 319
    assert find_end_token(model_of(config, None)) == END
    assert find_end_token(model_of(config, None, tokenizer=None)) == 319
    assert find_end_token(model_of(GPT2Config(vocab_size=300, eos_token_id=7), None)) == END


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights(model, dtype):
    exact, narrow = (
        generate(model, "hello", max_new_tokens=4, do_sample=False, dtype=d)[0] for d in (None, dtype)
    )
    assert exact.token_ids[0] == narrow.token_ids[0]
    assert exact.logprobs[0] != narrow.logprobs[0]
    assert abs(exact.logprobs[0] - narrow.logprobs[0]) < 0.1


# ---- mistakes ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 5}, r"max_length must be above the length of prompt 1 \(5 tokens\), got 5"),
        (
            {"max_new_tokens": 60},
            r"prompt 1 has 5 tokens; with 60 new ones that makes 65.*64: ask for at most 59",
        ),
        ({"max_length": 65}, "65.*context"),
        ({"batch_size": 0}, "batch_size must be a positive whole number, got 0"),
        ({"seed": -1}, r"seed must be a whole number from 0 to 2\*\*32 - 1, or 2 of them.*got -1"),
        ({"seed": 2**32}, "seed .*got 4294967296"),
        ({"seed": [1]}, r"2 of them, one for each row, got \[1\]"),
        ({"seed": "x"}, "seed .*got 'x'"),
        ({"seed": None}, "seed .*got None"),
        ({"stop_token_ids": [300]}, "stop_token_ids: token id 300 is outside the vocabulary of 300"),
        (
            {"dtype": "int4"},
            "dtype must be one of float32, tensorfloat32, bfloat16, float16, int8, or None, got 'int4'",
        ),
        ({"bad_words": [[300]]}, "bad_words: token id 300"),
        ({"penalty_alpha": 0.5, "top_k": 301}, "top_k must be one number of candidates from 1 to 300"),
        ({"penalty_alpha": 0.5, "top_k": [3, 4]}, r"top_k must be one number .*got \[3, 4\]"),
    ],
    ids=str,
)
def test_generate_names_settings_that_do_not_fit(model, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [[1], [1, 2, 3, 4, 5]], **settings)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], [300]], "prompt 1: token id 300 is outside the vocabulary of 300"),
        ([[-1]], "prompt 0: token id -1"),
        ([[1.5]], "prompt 0: 1.5 is not a token id"),
        ([[True]], "prompt 0: True is not a token id"),
        ([["a", 1]], "prompt 0: 'a' is not a token id"),
        (["a", None], "prompt 1 must be a text or a list of token ids, got None"),
        (None, "prompts must be .*got None"),
        (3, "prompts must be .*got 3"),
        (b"ab", "prompts must be .*got b'ab'"),
        (["a", b"ab"], "prompt 1 must be .*got b'ab'"),
        ([[1] * 64], "prompt 0 has 64 tokens.*shorten the prompt below 64 tokens"),
        ([[1] * 200], "prompt 0 has 200 tokens"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_impossible_prompts_are_named(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts)


@pytest.mark.parametrize("call", [generate, stream, beam_search])
def test_a_name_is_no_model(call):
    with pytest.raises(ValueError, match="model must be a LanguageModel, got 'gpt2-mini'; gpt2jax.load"):
        call("gpt2-mini", "a")
