"""Validation: rules for single values, and a decorator that holds the fields of a dataclass to their rules.

A rule belongs to a field through its annotation:

    @validated
    @dataclasses.dataclass(frozen=True)
    class Config:
        steps: Annotated[int, positive_int] = 100
        optimizer: Literal["adamw", "sgd"] = "adamw"
        dropout: Annotated[float | None, in_range(0, 1, open_end=True)] = None

`bool` and `Literal` need no rule; None is legal where the annotation says so. Every error reads
`<field> must be <legal>, got <value>`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gpt2jax.utils.other_names import our_name

# repr of a value for a message: lists of a pickle may hold each other so often that repr never ends
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict, _SHORT.maxset = 3, 30, 30, 30, 30
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 110
LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
SEED_RANGE = 2**32

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Rule:
    """A set of legal values.

    Attributes:
        legal: what an error says behind "must be".
        convert: returns the value as Python's own kind (which JSON and jit take); raises ValueError or TypeError if
            it is not legal.
    """

    legal: str
    convert: Callable[[Any], Any]


def check(name: str, value: Any, rule: Rule) -> Any:
    """Return `value` converted by a rule.

    Raises:
        ValueError: the value is not legal; the message names field, legal values and the value.
    """
    try:
        return rule.convert(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(must_be(name, rule.legal, value)) from None


def must_be(name: str, legal: str, value: Any) -> str:
    """Build the message of a value that is not legal, such as "steps must be a positive whole number, got 0"."""
    return f"{name} must be {legal}, got {_SHORT.repr(value):.100}"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Build the message of a name that does not exist.

    It gives the known name of what has this name in another library, else the nearest known one, else all of them.
    """
    known = list(known)
    ours = our_name(name, known)
    near = [ours] if ours else difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"there is no {kind} {name!r}; {hint}"


def check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for the first of `names` that is not known; the message gives the nearest known one."""
    known = list(known)
    for name in names:
        if name not in known:
            raise TypeError(unknown_name(kind, name, known))


def _accept(test: Callable[[Any], bool], kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if not test(value):
            raise ValueError
        return kind(value)

    return convert


def _to_unicode(text: str) -> str:
    text.encode()  # raises UnicodeEncodeError, a ValueError
    return str(text)


def at_least(least: int) -> Rule:
    """Build the rule of whole numbers from `least` on."""
    legal = "a positive whole number" if least == 1 else f"a whole number of at least {least}"
    return Rule(legal, _accept(lambda x: is_integer(x) and x >= least, int))


def int_in_range(low: int, high: int) -> Rule:
    """Build the rule of whole numbers from `low` to `high`, both legal."""
    return Rule(
        f"a whole number from {low} to {high}", _accept(lambda x: is_integer(x) and low <= x <= high, int)
    )


def above(low: float) -> Rule:
    """Build the rule of finite numbers above `low`."""
    legal = "a positive number" if low == 0 else f"a number above {low:g}"
    return Rule(legal, _accept(lambda x: is_number(x) and x > low, float))


def in_range(
    low: float, high: float | None = None, *, open_start: bool = False, open_end: bool = False
) -> Rule:
    """Build the rule of finite numbers from `low` to `high`; an open end is not legal itself."""

    def inside(x: Any) -> bool:
        if not is_number(x) or x < low or (open_start and x == low):
            return False
        return high is None or x < high or (x == high and not open_end)

    start = f"above {low:g}" if open_start else f"of at least {low:g}"
    end = "" if high is None else f" and {'below' if open_end else 'at most'} {high:g}"
    return Rule(f"a number {start}{end}", _accept(inside, float))


def one_of(choices: Iterable[Any]) -> Rule:
    """Build the rule of some given values."""
    choices = tuple(choices)

    def convert(value: Any) -> Any:
        # 1 == True: a choice counts with its type
        return next(choice for choice in choices if type(choice) is type(value) and choice == value)

    def legal(value: Any) -> Any:
        try:
            return convert(value)
        except StopIteration:
            raise ValueError from None

    return Rule(f"one of {', '.join(map(str, choices))}", legal)


def each(rule: Rule) -> Rule:
    """Build the rule of lists whose items obey `rule`; a single text is not taken for a list of letters."""

    def convert(values: Any) -> tuple[Any, ...]:
        if isinstance(values, str | bytes | Mapping | set | frozenset):
            raise ValueError
        return tuple(rule.convert(value) for value in values)

    return Rule(f"a list, each item {rule.legal}", convert)


def instance_of(kind: type) -> Rule:
    """Build the rule of the instances of one class."""

    def convert(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return Rule("a dict" if kind is Mapping else f"a {kind.__name__}", convert)


def optional(rule: Rule) -> Rule:
    """Build the rule that also takes None."""
    return Rule(f"{rule.legal}, or None", lambda value: None if value is None else rule.convert(value))


positive_int = at_least(1)
# of an axis or of a loop on a device, which count in 32 bits
array_size = Rule(
    "a positive whole number below 2**31", _accept(lambda x: is_integer(x) and 0 < x < 2**31, int)
)
non_negative_int = at_least(0)
integer = Rule("a whole number", _accept(lambda x: is_integer(x), int))
number = Rule("a finite number", _accept(lambda x: is_number(x), float))
positive_number = above(0)
boolean = Rule("True or False", _accept(lambda x: isinstance(x, bool), bool))
string = Rule("a text", _accept(lambda x: isinstance(x, str), str))
# a lone half of a surrogate pair has no UTF-8, so that no text of a model can hold it
unicode_text = Rule(
    "a text in Unicode, not empty", _accept(lambda x: isinstance(x, str) and x != "", _to_unicode)
)
non_empty_string = Rule("a text that is not empty", _accept(lambda x: isinstance(x, str) and x != "", str))
seed = Rule("a whole number from 0 to 2**32 - 1", _accept(lambda x: is_seed(x), int))


def rule_of(annotation: Any) -> Rule | None:
    """Return the rule that an annotation stands for, or None if it does not restrict its values."""
    metadata: tuple[Any, ...] = ()
    if typing.get_origin(annotation) is typing.Annotated:
        annotation, *rest = typing.get_args(annotation)
        metadata = tuple(rest)
    takes_none = False
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = typing.get_args(annotation)
        takes_none = type(None) in members
        members = tuple(member for member in members if member is not type(None))
        annotation = members[0] if len(members) == 1 else annotation
    rule = next((item for item in metadata if isinstance(item, Rule)), None)
    if rule is None and typing.get_origin(annotation) is typing.Annotated:
        rule = rule_of(annotation)
    if rule is None and annotation is bool:
        rule = boolean
    if rule is None and typing.get_origin(annotation) is typing.Literal:
        rule = one_of(typing.get_args(annotation))
    return optional(rule) if rule is not None and takes_none else rule


@functools.cache
def field_rules(cls: type) -> dict[str, Rule]:
    """Return the rule of each field of a dataclass that has one."""
    hints = typing.get_type_hints(cls, include_extras=True)
    rules = {field.name: rule_of(hints[field.name]) for field in dataclasses.fields(cls)}
    return {name: rule for name, rule in rules.items() if rule is not None}


def validated(cls: type[T]) -> type[T]:
    """Make a frozen dataclass check and convert its fields when it is built; a class decorator.

    The fields are checked before the class's own `__post_init__`, which is left with rules between fields. An
    unknown field is a TypeError that names the nearest known one. A class attribute `error_prefix` (such as "lora.")
    stands before the names of fields in errors.
    """
    own = cls.__dict__.get("__post_init__")
    build = cls.__init__

    def __post_init__(self: Any) -> None:
        prefix = getattr(cls, "error_prefix", "")
        for name, rule in field_rules(cls).items():
            set_field(self, name, check(prefix + name, getattr(self, name), rule))
        if own is not None:
            own(self)

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        fields = dataclasses.fields(typing.cast(Any, cls))
        check_names("setting", kwargs, [field.name for field in fields if field.init])
        build(self, *args, **kwargs)
        if own is None:  # the __init__ that dataclasses wrote calls no method that was not there
            __post_init__(self)

    setattr(cls, "__post_init__", __post_init__)  # noqa: B010, a type checker knows no such attribute
    setattr(cls, "__init__", __init__)  # noqa: B010
    return cls


def field_names(cls: type) -> list[str]:
    """Return the names of a dataclass's fields."""
    return [field.name for field in dataclasses.fields(typing.cast(Any, cls))]


def override_fields(name: str, cls: type[T], config: T | None, overrides: Mapping[str, Any]) -> T:
    """Return `config` (default: the defaults of `cls`) with some fields replaced.

    Raises:
        ValueError: a value is not legal, or `config` is not a `cls`; the message calls it `name`.
    """
    config = cls() if config is None else config
    if not isinstance(config, cls):
        article = "an" if cls.__name__[0] in "AEIOU" else "a"
        raise ValueError(must_be(name, f"{article} {cls.__name__}, or None", config))
    return dataclasses.replace(typing.cast(Any, config), **overrides)


def set_field(settings: Any, name: str, value: Any) -> None:
    """Set a field of a frozen dataclass to a validated built-in type."""
    object.__setattr__(settings, name, value)


def is_integer(value: Any) -> bool:
    """Return whether a value is a whole number of Python or NumPy; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a number that is finite in float32; True and False are not."""
    return (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and -LARGEST_FLOAT32 <= value <= LARGEST_FLOAT32
    )


def is_seed(value: Any) -> bool:
    """Return whether a value is a whole number of 32 bits."""
    return is_integer(value) and 0 <= value < SEED_RANGE


def check_model(name: str, model: Any) -> None:
    """Raise ValueError for a value without configuration and parameters, such as a model's name."""
    if not hasattr(model, "config") or not hasattr(model, "params"):
        raise ValueError(must_be(name, "a LanguageModel", model) + "; gpt2jax.load(name) returns one")


def check_path(name: str, value: Any) -> Path:
    """Return a path with "~" expanded; `~user` is left unchanged if the user does not exist.

    Raises:
        ValueError: the value is not a path, or it is empty.
    """
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(must_be(name, "a name or a path, and not empty", value))
    return Path(os.path.expanduser(path))


def check_texts(name: str, texts: Any) -> None:
    """Raise TypeError for a value that does not give texts one by one in a fixed order.

    A single text would be taken for its letters, and a dict of columns or splits for their names. The order of a set
    differs from program to program.
    """
    if isinstance(texts, str | bytes):
        raise TypeError(f"{name} must be a list of texts, got one string")
    if isinstance(texts, Mapping | set | frozenset) or not (
        hasattr(texts, "__iter__") or hasattr(texts, "__getitem__")
    ):
        raise TypeError(must_be(name, "a list of texts", texts))
