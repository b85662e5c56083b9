"""`gpt2jax generate`: continue prompts from the command line, a file or standard input."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from gpt2jax.cli.common import check_file, run_command
from gpt2jax.utils.progress import is_interactive


@dataclasses.dataclass(frozen=True)
class Options:
    """Continue prompts.

    Without prompts, lines of standard input are prompts; at a terminal, it asks for them one by one.

    Attributes:
        prompts: texts to continue; "" begins a text of its own.
        file: a file with one prompt a line, or JSON lines with a field "prompt".
        model: gpt2-mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, or a path (a run folder, too).
        max_new_tokens: most tokens to add. Default: 64.
        max_length: most tokens of prompt and continuation together; instead of --max-new-tokens.
        temperature: below 1 sharpens, above 1 flattens; 0 is greedy.
        top_k: draw among so many of the likeliest tokens; 0 for all.
        top_p: draw among the likeliest tokens that hold this share.
        min_p: leave out tokens below this share of the likeliest one.
        typical_p: draw among the tokens of the most usual information that hold this share.
        greedy: always the likeliest token.
        repetition_penalty: above 1 makes tokens less likely that the text has already.
        presence_penalty: taken off the logits of tokens that the continuation has already.
        frequency_penalty: the same, for each time that it has them.
        no_repeat_ngram: so many tokens never stand twice in the same order; 0 allows it.
        bad_words: texts that must not come.
        min_new_tokens: no end before so many new tokens.
        num_samples: continuations of each prompt.
        seed: prompt i draws with seed + i.
        stop: texts that end a continuation.
        slide: go on past the model's context, from the last half of the text each time.
        top_logprobs: with --out, write so many of the likeliest tokens at each step.
        prompt_lookup: guess up to so many tokens at once from earlier text; faster where text repeats, and the same
            text; 0 is off.
        draft: a smaller model that guesses tokens, for the same text at more speed.
        draft_tokens: how many it guesses at once.
        penalty_alpha: above 0 is contrastive search among --top-k tokens: so much weight lies on not repeating. No
            option of sampling goes with it.
        beams: above 0 is beam search with so many texts at once; no chance is in it, and no option of sampling or
            stopping goes with it.
        length_penalty: with --beams, above 0 prefers longer texts, below 0 shorter ones.
        batch_size: most prompts to continue at once, with --out or --num-samples.
        dtype: of the weights: float32, bfloat16, float16, int8. Default: float32 on a CPU, bfloat16 elsewhere.
        out: write JSON lines to this file instead of text to the terminal; - is standard output.
    """

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    file: pathlib.Path | None = None
    model: str = "gpt2-mini"
    max_new_tokens: int | None = None
    max_length: int | None = None
    temperature: float = 1.0
    top_k: int = 5
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    greedy: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    bad_words: tuple[str, ...] = ()
    min_new_tokens: int = 0
    num_samples: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    slide: bool = False
    top_logprobs: int = 0
    prompt_lookup: int = 0
    draft: str | None = None
    draft_tokens: int = 4
    penalty_alpha: float = 0.0
    beams: int = 0
    length_penalty: float = 1.0
    batch_size: int = 32
    dtype: str | None = None
    out: pathlib.Path | None = None


_PASSED_ON = (
    "max_new_tokens",
    "max_length",
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram",
    "bad_words",
    "min_new_tokens",
    "top_logprobs",
    "prompt_lookup",
    "draft_tokens",
    "penalty_alpha",
    "dtype",
)
_FOR_BEAMS = (
    "max_new_tokens",
    "max_length",
    "length_penalty",
    "repetition_penalty",
    "no_repeat_ngram",
    "bad_words",
    "min_new_tokens",
    "batch_size",
    "dtype",
)
# what is no setting of a search
_OF_THE_COMMAND = ("prompts", "file", "model", "beams", "num_samples", "seed", "out")
_NOT_CONTRASTIVE = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "greedy",
    "num_samples",
    "prompt_lookup",
    "draft",
    "draft_tokens",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    run_command("generate", Options, run, argv)


def run(options: Options) -> None:
    """Loads the model and continues the prompts."""
    from gpt2jax.generation.generate import stream
    from gpt2jax.loading import load

    check_search(options)
    prompts = read_prompts(options)
    interactive = not prompts and sys.stdin is not None and sys.stdin.isatty()
    if not prompts and not interactive:
        prompts = [] if sys.stdin is None else sys.stdin.read().splitlines()
        if not prompts:
            raise ValueError("there is no prompt: give one as an argument, in --file, or on standard input")
    if options.beams and interactive:
        raise ValueError("--beams has no text before its end to show as it comes; give prompts")
    if 0 < options.beams < options.num_samples:
        raise ValueError(f"--num-samples {options.num_samples} is over --beams {options.beams}")
    if options.out is not None and str(options.out) != "-":
        check_file(options.out, overwrite=True)
    model = load(options.model)
    if options.beams:
        _write(functools.partial(_search, model, prompts, options), options)
        return
    settings = {name: getattr(options, name) for name in _PASSED_ON} | {
        "top_k": options.top_k or None,
        "do_sample": not options.greedy,
        "stop_strings": options.stop or None,
        "past_context": "slide" if options.slide else "refuse",
        "draft": None if options.draft is None else load(options.draft),
    }
    if interactive:
        _converse(model, settings, options)
    elif options.out is None and options.num_samples == 1:
        for index, prompt in enumerate(prompts):
            _show(prompt, stream(model, prompt, seed=options.seed + index, **settings))
    else:
        _write(functools.partial(_draw, model, prompts, settings, options), options)


def check_search(options: Options) -> None:
    """Refuses options that the way of choosing tokens would pass over."""
    given = [
        field.name for field in dataclasses.fields(options) if getattr(options, field.name) != field.default
    ]
    if options.beams:
        search = f"--beams {options.beams}"
        unused = [name for name in given if name not in (*_FOR_BEAMS, *_OF_THE_COMMAND)]
    elif options.penalty_alpha:
        search = f"--penalty-alpha {options.penalty_alpha:g}"
        unused = [name for name in given if name in (*_NOT_CONTRASTIVE, "length_penalty")]
    else:
        search, unused = "sampling", [name for name in given if name == "length_penalty"]
    if unused:
        names = ", ".join("--" + name.replace("_", "-") for name in unused)
        raise ValueError(f"{search} does not go with {names}")


def read_prompts(options: Options) -> list[str]:
    """The prompts of the arguments and of the file."""
    prompts = list(options.prompts)
    if options.file is None:
        return prompts
    if not options.file.is_file():
        raise FileNotFoundError(f"there is no file {options.file}")
    for number, line in enumerate(options.file.read_text("utf-8").splitlines(), 1):
        if options.file.suffix != ".jsonl":
            prompts.append(line)
            continue
        try:
            prompts.append(json.loads(line)["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f'{options.file}, line {number}: expected JSON with a field "prompt"') from None
    return prompts


def _show(prompt: str, pieces: Any) -> None:
    """Prints a continuation as it comes, and to a terminal how fast that was."""
    began, first = time.perf_counter(), None
    print(prompt, end="", flush=True)
    for piece in pieces:
        first = first or time.perf_counter()
        print(piece, end="", flush=True)
    print()
    if first is not None and is_interactive():
        output, seconds = pieces.generation, time.perf_counter() - began
        tokens = len(output.token_ids)
        speed = f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} a second"
        guesses = f", {output.accepted} of {output.drafted} guesses right" if output.drafted else ""
        print(f"[first text after {first - began:.2f} s; {speed}{guesses}]", file=sys.stderr)


def _converse(model: Any, settings: dict[str, Any], options: Options) -> None:
    from gpt2jax.generation.generate import stream

    print("Type the beginning of a text; an empty line lets the model begin; Ctrl-D ends.", file=sys.stderr)
    index = 0
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        try:
            _show(prompt, stream(model, prompt, seed=options.seed + index, **settings))
        except ValueError as error:  # a prompt that is too long must not end the conversation
            print(f"error: {error}", file=sys.stderr)
        index += 1


def _draw(model: Any, prompts: list[str], settings: dict[str, Any], options: Options) -> list[Any]:
    from gpt2jax.generation.generate import generate

    return generate(
        model,
        prompts,
        seed=options.seed,
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        **settings,
    )


def _search(model: Any, prompts: list[str], options: Options) -> list[Any]:
    from gpt2jax.generation.beam_search import beam_search

    settings = {name: getattr(options, name) for name in _FOR_BEAMS}
    found = beam_search(model, prompts, num_beams=options.beams, num_return=options.num_samples, **settings)
    return [beam for beams in found for beam in beams]


def _json_line(content: dict[str, Any]) -> str:
    """A line of JSON, readable, but for bytes of a prompt that are no UTF-8 and can be written as numbers only."""
    line = json.dumps(content, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(content) + "\n"
    return line


def _write(make: Callable[[], list[Any]], options: Options) -> None:
    """Prints continuations, or writes them as JSON lines and says how fast they were made."""
    from gpt2jax.utils.atomic_io import atomic_write

    began = time.perf_counter()
    outputs = make()
    seconds = time.perf_counter() - began
    if options.out is None:
        for output in outputs:
            print(str(output) + "\n")
        return
    lines = [_json_line(dataclasses.asdict(output)) for output in outputs]
    if str(options.out) == "-":
        sys.stdout.writelines(lines)
    else:
        with atomic_write(options.out) as file:
            file.writelines(lines)
    tokens = sum(len(output.token_ids) for output in outputs)
    where = "standard output" if str(options.out) == "-" else options.out
    print(
        f"wrote {len(outputs)} continuations, {tokens} tokens in {seconds:.1f} s, "
        f"{tokens / seconds:.0f} a second, to {where}",
        file=sys.stderr,
    )
