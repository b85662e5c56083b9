"""`gpt2jax generate`: continue prompts from the command line, a file or standard input."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, arg

from gpt2jax.cli.common import check_file, named_fields, run_command
from gpt2jax.cli.options import GenerationOptions, TextOptions
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.utils.json_files import parse_json
from gpt2jax.utils.notices import count_noun, printable, terminal_text
from gpt2jax.utils.progress import is_interactive
from gpt2jax.utils.validation import must_be

JSON_LINES = (".jsonl", ".ndjson", ".json")
NOT_LINES = (".csv", ".tsv", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip")


@dataclasses.dataclass(frozen=True)
class Options:
    """Continue prompts.

    Without prompts, lines of standard input are prompts; at a terminal, it asks for them one by one.

    $ gpt2jax generate "Return the" --model runs/gpt2-mini-numeric-docs --max-new-tokens 40
    $ gpt2jax generate --file prompts.jsonl --out texts.jsonl --top-p 0.9 --top-k 0

    Attributes:
        prompts: texts to continue; "" lets the model begin a text.
        file: a file with one prompt a line, or of JSON (lines, or a list of objects) with a field "prompt", such as
            --out writes; blank lines are skipped.
        model: gpt2-mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub id, or a path (a run folder, too).
        text: how prompts become tokens.
        draft_model: speculative decoding: a smaller model that drafts tokens, named like --model. The continuation
            stays the same.
        seed: row i draws with seed + i.
        batch_size: most rows, or beams, to run at once.
        dtype: of the weights: float32, bfloat16, float16, int8. Default: float32 on a CPU, bfloat16 elsewhere.
        out: write JSON lines to this file instead of text to the terminal; - is standard output.
        config: how to generate. What is not given comes from generation_config.json beside the weights, if it says
            so; a line shows what does.
    """

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    file: pathlib.Path | None = None
    model: str = "gpt2-mini"
    text: Annotated[TextOptions, OmitArgPrefixes, arg(name="tokenizer")] = TextOptions()
    draft_model: str | None = None
    seed: int = 0
    batch_size: int = 32
    dtype: str | None = None
    out: pathlib.Path | None = None
    config: Annotated[GenerationOptions, OmitArgPrefixes, arg(name="generation")] = GenerationOptions()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    given = named_fields(GenerationConfig, sys.argv[1:] if argv is None else argv)
    run_command("generate", Options, functools.partial(run, given=given), argv)


def run(options: Options, given: Collection[str]) -> None:
    """Load the model and continue the prompts; `given` names the settings of generation that the user gave."""
    from gpt2jax.generation.generator import Generator
    from gpt2jax.generation.requests import make_request
    from gpt2jax.loading import load

    rows = read_rows(options)
    prompts = [row["prompt"] for row in rows]
    interactive = not prompts and sys.stdin is not None and sys.stdin.isatty()
    if not prompts and not interactive:
        prompts = [] if sys.stdin is None else _split_lines(sys.stdin.read().removeprefix("\ufeff"))
        rows = [{"prompt": prompt} for prompt in prompts]
        if not prompts:
            raise ValueError("there is no prompt: give one as an argument, in --file, or on standard input")
    settings = {name: getattr(options.config, name) for name in given}
    if options.out is not None and str(options.out) != "-":
        check_file(options.out, overwrite=True)
    with Generator(options.text.load(options.model), dtype=options.dtype) as generator:
        if options.draft_model is not None:
            settings["draft_model"] = load(options.draft_model)
        config = make_request(generator.model, [], None, settings).config
        can_stream = config.num_beams == config.num_return_sequences == 1
        if interactive and not can_stream:
            raise ValueError(
                "num_beams and num_return_sequences must be 1 to continue prompts as they are typed"
            )

        def show(index: int, prompt: str) -> None:
            pieces = generator.stream(prompt, seed=options.seed + index, **settings)
            _show(prompt, pieces, show_time=is_interactive() or len(prompts) > 1)

        if interactive:
            _ask_for_prompts(show)
        elif options.out is None and can_stream:
            for index, prompt in enumerate(prompts):
                if len(prompts) > 1:
                    print("\n" * (index > 0) + f"--- prompt {index + 1} of {len(prompts)} ---")
                show(index, prompt)
        else:
            _write(
                lambda: generator.generate(
                    prompts, seed=options.seed, batch_size=options.batch_size, **settings
                ),
                options.out,
                [row for row in rows for _ in range(config.num_return_sequences)],
            )


def read_rows(options: Options) -> list[dict[str, Any]]:
    """Return the prompts of the arguments and of the file, each with the other fields of its line of JSON."""
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in options.prompts]
    if options.file is None:
        return rows
    if not options.file.is_file():
        if not options.file.exists():
            raise FileNotFoundError(f"there is no file {options.file}")
        reason = "must be a file, got a folder, a pipe or a device; standard input is read too"
        raise ValueError(f"--file {options.file} {reason}")
    data = options.file.read_bytes()
    try:
        content = data.decode("utf-8-sig")  # programs of Windows begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise ValueError(f"{options.file}, line {line}: the file must be UTF-8; save it as UTF-8") from None
    suffix = options.file.suffix.lower()
    if suffix in NOT_LINES:
        raise ValueError(
            f"{options.file}: a file of prompts must have one prompt a line, or JSON lines, got {suffix}"
        )
    lines = _split_lines(content)
    is_json = suffix in JSON_LINES or _has_json_prompt(next(filter(str.strip, lines), ""))
    if is_json and content.lstrip().startswith("["):
        entries = enumerate(parse_json(content, str(options.file)), 1)
        return rows + [_json_row(entry, f"{options.file}, entry {number}") for number, entry in entries]
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{options.file}, line {number}"
            rows.append(_json_row(_parse_row(line, place), place) if is_json else {"prompt": line})
    return rows


def _split_lines(text: str) -> list[str]:
    """Split at line ends alone: a prompt may hold U+2028 and others, at which `str.splitlines` splits."""
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n") if text else []


def _has_json_prompt(line: str) -> bool:
    """Return whether a line is one that `generate --out` writes, whatever its file is called."""
    try:
        row = parse_json(line, "") if line.startswith("{") else None
    except ValueError:
        return False
    return isinstance(row, dict) and isinstance(row.get("prompt"), str)


def _parse_row(line: str, place: str) -> Any:
    try:
        return parse_json(line, place)
    except ValueError:
        raise ValueError(f'{place}: expected JSON with a field "prompt"') from None


def _json_row(row: Any, place: str) -> dict[str, Any]:
    """Return an object of JSON with a prompt, such as `generate --out` writes."""
    if not isinstance(row, dict) or "prompt" not in row:
        raise ValueError(f'{place}: expected JSON with a field "prompt"')
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        raise ValueError(must_be(f'{place}: the field "prompt"', "a text", prompt))
    return row


def _show(prompt: str, pieces: Any, *, show_time: bool) -> None:
    """Print a continuation as it comes, and on standard error how fast that was."""
    began, first = time.perf_counter(), None
    print(terminal_text(prompt), end="", flush=True)
    for piece in pieces:
        first = first or time.perf_counter()
        print(terminal_text(piece), end="", flush=True)
    print()
    if first is not None and show_time:
        output, seconds = pieces.generation, time.perf_counter() - began
        drafts = f", {output.accepted} of {output.drafted} draft tokens accepted" if output.drafted else ""
        print(
            f"[first text after {first - began:.2f} s; {_speed([output], seconds)}{drafts}]", file=sys.stderr
        )


def _ask_for_prompts(show: Callable[[int, str], None]) -> None:
    """Ask for prompts one by one and continue each."""
    print("Type the beginning of a text; an empty line lets the model begin; Ctrl-D ends.", file=sys.stderr)
    index = 0
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        try:
            show(index, prompt)
        except ValueError as error:  # a prompt that is too long must not end the program
            print(f"error: {printable(str(error))}", file=sys.stderr)
        index += 1


def _json_line(content: dict[str, Any]) -> str:
    """Return a line of JSON without NaN: readable, unless a prompt has bytes that are not UTF-8 and need escapes."""
    from gpt2jax.evaluation.result import finite_values

    content = finite_values(content)
    line = json.dumps(content, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(content) + "\n"
    return line


def _write(make: Callable[[], list[Any]], out: pathlib.Path | None, rows: list[dict[str, Any]]) -> None:
    """Print continuations, or write them as JSON lines behind the fields of their prompts and say how fast it was."""
    from gpt2jax.utils.atomic_io import atomic_write

    began = time.perf_counter()
    outputs = make()
    seconds = time.perf_counter() - began
    if out is None:
        for index, output in enumerate(outputs):
            if len(outputs) > 1:
                print("\n" * (index > 0) + f"--- text {index + 1} of {len(outputs)} ---")
            print(terminal_text(str(output)))
        print(f"[{_speed(outputs, seconds)}]", file=sys.stderr)
        return
    lines = [_json_line(row | dataclasses.asdict(output)) for row, output in zip(rows, outputs, strict=True)]
    if str(out) == "-":
        sys.stdout.writelines(lines)
    else:
        with atomic_write(out) as file:
            file.writelines(lines)
    where = "standard output" if str(out) == "-" else printable(str(out))
    written = count_noun(len(outputs), "continuation")
    print(f"wrote {written}, {_speed(outputs, seconds)}, to {where}", file=sys.stderr)


def _speed(outputs: list[Any], seconds: float) -> str:
    tokens = sum(len(output.token_ids) for output in outputs)
    rate = tokens / seconds
    return f"{count_noun(tokens, 'token')} in {seconds:.2f} s, {rate:.{0 if rate >= 10 else 1}f} a second"
