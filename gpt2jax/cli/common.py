"""What all commands share: arguments from dataclasses, one line for a user's mistake, texts by option."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import os
import pathlib
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_type_hints

import tyro

from gpt2jax.cli.parse_errors import describe_parse_error
from gpt2jax.utils.atomic_io import describe_place, follow_links
from gpt2jax.utils.notices import Notice, printable, wrap_lines
from gpt2jax.utils.validation import check_path, field_names

if TYPE_CHECKING:
    pass

T = TypeVar("T")

# what a user can cause and mend; anything else is a bug and shows its traceback
USER_ERRORS = (
    ValueError,
    OSError,  # no such file, a full disk, a file system that can't be written to; the hub does not answer
    ModuleNotFoundError,  # of an optional package; the message says what to install
)

APPENDED = ("--more-data",)  # options that may be given several times


def run_command(
    name: str,
    options: type[T],
    run: Callable[[T], None],
    argv: Sequence[str] | None = None,
    *,
    prefixes: bool = False,
) -> None:
    """Parse the arguments into `options` and run; a user's mistake is one line and exit code 2.

    Args:
        name: of the command.
        options: a dataclass.
        run: takes the parsed options.
        argv: the arguments; None: those of the program.
        prefixes: the names of nested options have a prefix, as in --lora.rank, unless their field is named "".
    """
    for stream in (sys.stdout, sys.stderr):  # what an encoding does not have must not end a program
        # "surrogateescape" is Python's choice for the C locale
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("jax._src.xla_bridge").addFilter(_in_one_line)
    warnings.showwarning = functools.partial(_show_notice, name, set(), warnings.showwarning)
    try:
        try:
            run(_parse(name, options, argv, prefixes=prefixes))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a full disk is told as any other one
    except BrokenPipeError:  # the reader has seen enough; first, for it is a connection error as well
        sys.stderr.close()
        raise SystemExit(1) from None
    except USER_ERRORS as error:
        if isinstance(error, OSError):
            _drop_unwritten()
        exit_with_error(name, _name_option(str(error), options))
    except FloatingPointError as error:
        exit_with_error(name, str(error), code=1)
    except (MemoryError, RuntimeError, AssertionError) as error:
        problem = _find_problem(error)
        if problem is None:
            raise
        exit_with_error(name, problem)
    except KeyboardInterrupt as interrupt:  # 130 for Ctrl-C, 143 for SIGTERM, as shells count
        exit_with_error(name, str(interrupt) or "interrupted", code=128 + getattr(interrupt, "signal", 2))


def _in_one_line(record: logging.LogRecord) -> bool:
    """Replace the traceback of a plugin of jax that finds no device, or no driver, by its last line."""
    if record.exc_info:
        text = f"{record.getMessage()}: {record.exc_info[1]}"
        record.msg, record.args, record.exc_info = " ".join(text.split()), (), None
    return True


def _show_notice(
    name: str, shown: set[str], show: Any, message: Any, category: type[Warning], *place: Any, **kwargs: Any
) -> None:
    """Print a notice as one line, and only once; any other warning as Python does."""
    if issubclass(category, Notice):
        line = f"gpt2jax {name}: note: {_one_line(str(message))}"
        if line not in shown:  # Python forgets what it has shown when jax changes the filters of warnings
            print(wrap_lines(line, sys.stderr), file=sys.stderr)
        shown.add(line)
    else:
        show(message, category, *place, **kwargs)


def _drop_unwritten() -> None:
    """Point stdout at /dev/null if it can't be written to, so that the flush at the program's end does not fail."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_repeated(name: str, argv: Sequence[str]) -> None:
    """End the program if an option is given twice: tyro would take the last one without a word."""
    seen = set()
    for word in argv:
        option = word.partition("=")[0].replace("_", "-")
        if re.fullmatch(r"--[a-z][\w.-]*", option) and option not in APPENDED:
            if option in seen:
                exit_with_error(
                    name,
                    f"{option} is given twice; several values of one option stand behind it, as in {option} A B",
                )
            seen.add(option)


class _HelpStream(io.StringIO):
    """What stands for standard output while the parser prints its help, with the looks of the real one."""

    def __init__(self) -> None:
        super().__init__()
        self._real = sys.stdout

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._real.encoding

    def isatty(self) -> bool:
        return self._real.isatty()


def _parse(name: str, options: type[T], argv: Sequence[str] | None, *, prefixes: bool) -> T:
    _check_repeated(name, sys.argv[1:] if argv is None else argv)
    config = () if prefixes else (tyro.conf.OmitArgPrefixes,)
    said, helped = io.StringIO(), _HelpStream()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(helped):
            parsed = tyro.cli(options, prog=f"gpt2jax {name}", args=argv, config=config)
    except SystemExit as end:
        if end.code != 2:
            print(wrap_lines(helped.getvalue(), sys.stdout), end="")
            raise
        reason = _name_option(describe_parse_error(said.getvalue(), _settings_of(options)), options)
        exit_with_error(name, f"{reason}; see gpt2jax {name} --help")
    # a shell leaves "~" as it is in --out=~/folder
    paths = {name: value for name, value in vars(parsed).items() if isinstance(value, pathlib.Path)}
    expanded: Any = {name: check_path(name, value) for name, value in paths.items()}
    return dataclasses.replace(parsed, **expanded)  # pyright: ignore[reportArgumentType]


def named_fields(options: type, argv: Sequence[str]) -> set[str]:
    """Return the fields of a class of options that a command line names, also with their default."""
    words = {word.partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    return {name for name in field_names(options) if {f"__{name}", f"__no_{name}"} & words}


def _name_option(message: str, options: type) -> str:
    """Return a message that begins with the name of a setting with the option that sets it."""
    name = re.match(r"[a-z][\w.]*(?= must )", message)
    if name is None or name[0] not in _settings_of(options):
        return message
    return f"--{name[0].replace('_', '-')}{message[name.end() :]}"


def _settings_of(options: type) -> set[str]:
    """Return the names of the settings that options set, those of nested options included."""
    names, kinds = set(), get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(default):
            prefix = getattr(default, "error_prefix", "")
            names |= {f"{prefix}{name}" for name in _settings_of(type(default))}
            continue
        markers = getattr(kinds[field.name], "__metadata__", ())
        if not {tyro.conf.Positional, tyro.conf.Suppress} & {*markers}:
            aliases = [alias for marker in markers for alias in getattr(marker, "aliases", None) or ()]
            names |= {field.name, *(alias.lstrip("-").replace("-", "_") for alias in aliases)}
    return names


def print_line(console: Any, what: str, text: str) -> None:
    """Print a line that begins with a bold word; neither markup nor control characters in the text take effect."""
    from rich.text import Text

    line = Text.assemble((printable(what), "bold"), "  ", printable(text))
    # a terminal would break it within a word; a file or a pipe gets it whole
    console.print(line, highlight=False, soft_wrap=not console.is_terminal)


def command_line(name: str) -> str:
    """Return the command as the user typed it, for a report, without the options for the place of the results."""
    kept, words = [], iter(sys.argv[2:] if sys.argv[1:2] == [name] else sys.argv[1:])
    for word in words:
        if word == "--out":
            next(words, None)
        elif word not in ("--overwrite", "--resume") and not word.startswith("--out="):
            kept.append(word)
    return shlex.join(["gpt2jax", name, *kept])


def exit_with_error(name: str, message: str, *, code: int = 2) -> NoReturn:
    """Print one line and end the program."""
    print(wrap_lines(f"gpt2jax {name}: error: {_one_line(message)}", sys.stderr), file=sys.stderr)
    raise SystemExit(code)


def _find_problem(error: BaseException) -> str | None:
    """Return what memory or the devices lack if that explains an error, else None."""
    from gpt2jax.ops.device import find_backend_problem

    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):  # of NumPy, of XLA
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"there is not enough memory: {reason}; a smaller batch, shorter rows or a smaller model need less"
    return find_backend_problem()


def _one_line(message: str, most: int = 3000) -> str:
    """Return a message as one line: names in a file may have megabytes. The hint at the end stays."""
    line = printable(" ".join(message.split()))
    return line if len(line) <= most else f"{line[: most - 1000]} … {line[-1000:]}"


def check_folder(path: pathlib.Path) -> None:
    """Raise OSError, before anything long begins, for an --out that cannot be a folder."""
    place = path
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"--out {path}: {describe_place(place)}; give the name of a folder")
    if not os.access(place, os.W_OK):
        raise PermissionError(f"--out {path}: {place} can't be written to")


def check_file(path: pathlib.Path, *, overwrite: bool) -> None:
    """Check the name of a file for results; an existing file needs `overwrite`."""
    if path.is_dir():
        raise IsADirectoryError(f"--out {path} is a folder: give the name of a file")
    target = follow_links(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"--out {path} is there already: --overwrite it, or choose another --out")
    check_folder(target.parent)
