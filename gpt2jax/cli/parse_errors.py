"""Errors of the command line's parser in the form that all errors have."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Collection

from gpt2jax.utils.other_names import our_name
from gpt2jax.utils.validation import must_be

_KINDS = {"INT": "a whole number", "FLOAT": "a number", "int": "a whole number", "float": "a number"}


def describe_parse_error(box: str, settings: Collection[str]) -> str:
    """Say what is wrong with a command line, from the box that tyro draws around a mistake.

    Args:
        box: what tyro prints.
        settings: the names that options set, with underscores, such as "lora.use_dora".
    """
    if "Missing from" in box:  # the names stand further left than what they mean
        missing = re.findall(r"^\W {5}(\S+)", box.partition("For full helptext")[0], flags=re.MULTILINE)
        return f"{' and '.join(missing)} must be given"
    message = _words(box)
    if listed := re.match(r"Unrecognized options: (.*?)(?: Perhaps | Arguments |$)", message):
        options = re.findall(r"(?<![\w.-])--?[a-zA-Z][\w.-]*", listed[1])
        if not options:
            return f"there is no place for {listed[1]!r}; options begin with --"
        return f"there is no option {', '.join(_with_near_one(option, settings) for option in options)}"
    if found := re.match(
        r"Error parsing (--\S+): no type matching (\{None\}\|)?(\w+) could .* from \['(.*)'\]", message
    ):
        option, optional, kind, value = found.groups()
        if kind in _KINDS:
            return must_be(option, _KINDS[kind] + ", or None" * bool(optional), value)
    if found := re.match(r"Error parsing (--\S+): (?:invalid|could).* (int|float)\b.*: '(.*)'", message):
        return must_be(found[1], _KINDS[found[2]], found[3])
    if found := re.match(r"invalid choice '(.*)' for argument '(--\S+)'\. Expected one of (\(.*\))", message):
        choices = sorted(map(str, ast.literal_eval(found[3])))  # tyro's order differs from run to run
        return must_be(found[2], f"one of {', '.join(choices)}", found[1])
    if found := re.match(r"Missing value for argument '(?:\(')?([\w.-]+)'", message):
        return f"{found[1]} needs a value"
    return message


def _words(box: str) -> str:
    """Return the words in the box, without its title and repeated help texts."""
    words: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip(" │")
        if text.startswith(("Argument helptext", "For full helptext", "Got errors")):
            break
        if not set(text) <= set("-─╭╮╰╯"):
            words.append(text)
    # tyro names our class of options before the error of a setting
    return re.sub(r"^Error parsing \w+: ", "", " ".join(words)).rstrip(".")


def _with_near_one(option: str, settings: Collection[str]) -> str:
    """Return an option that does not exist with ours of that meaning in another library, or the nearest one."""
    name = option.lstrip("-").replace("-", "_")
    if ours := our_name(name, settings):
        return f"{option} (here --{ours.replace('_', '-')})"
    near = difflib.get_close_matches(name, settings, n=1)
    return option + "".join(f" (did you mean --{ours.replace('_', '-')}?)" for ours in near)
