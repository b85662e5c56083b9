"""Between the tensors of a file and the parameter dict: one declarative table of rules per format.

A format reader delivers `{name: Tensor}`, where nothing is read yet; `load_params` checks all names, shapes and
dtypes against a table, reports every problem at once, and then reads one tensor at a time into its place.
`broadcast_prefix` is the way back. Blocks are separate in every file and stacked along a leading layer axis here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, abstract_params

FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")
PARAMETER_DTYPES = ("float32", "bfloat16", "float16")
PROBLEMS_SHOWN = 20
PIECE = 1 << 18  # numbers read at once: few enough to be in the cache still when they are checked


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file that has not been read.

    Attributes:
        shape: as in the file.
        dtype: NumPy's name of the dtype; "bfloat16" too.
        read: reads the values.
        file: where it lies, for messages; "" for one that no file has, because its format implies the values.
        offset: where in that file the values begin, where they lie there as in memory and nothing else is to be
            checked; otherwise None.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    file: str
    offset: int | None = None


@dataclasses.dataclass(frozen=True)
class ParamRule:
    """One line of a table: which tensor of a file is which parameter.

    Attributes:
        name: of the tensor; "{layer}" stands for the number of the block.
        path: of the parameter, its keys joined by dots.
        layout: how the file has one block's parameter [in, out] or [out]:
            "same";
            "transposed": [out, in];
            "heads_out": the output axis split in two, [..., N, H];
            "heads_in": the input axis split in two, [N, H, out];
            "leading_one": [1, in, out].
        part: 0, 1 or 2 where the tensor is only that third of the output axis (query, key, value), else None.
    """

    name: str
    path: str
    layout: str = "same"
    part: int | None = None


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where one tensor goes: rule, block, and its shape in the file."""

    rule: ParamRule
    layer: int | None
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """Weights in a file or folder, of which no value has been read.

    Attributes:
        config: the architecture that they are said to have.
        rules: the format's table.
        tensors: by the names of the table.
        name: of the file or folder, for messages.
    """

    config: GPT2Config
    rules: Sequence[ParamRule]
    tensors: Mapping[str, LazyTensor]
    name: str

    def load(self, dtype: str = "float32") -> tuple[GPT2Config, Params]:
        """(config, params), blocks stacked; raises what `load_params` raises."""
        return self.config, load_params(self.config, self.rules, self.tensors, self.name, dtype)


def load_params(
    config: GPT2Config,
    rules: Sequence[ParamRule],
    tensors: Mapping[str, LazyTensor],
    source: str,
    dtype: str = "float32",
) -> Params:
    """Parameters of `config` out of the tensors of a file.

    Host memory holds the parameters and one tensor; less where tensors can be read straight into their place.

    Args:
        config: the architecture that the file is said to have.
        rules: the format's table; rules of parameters that the architecture does not have are left out.
        tensors: by name; nothing of them has been read.
        source: name of the file or folder, for messages.
        dtype: of the parameters, one of `PARAMETER_DTYPES`; values are rounded to it as they are read.

    Raises:
        ValueError: naming all tensors that are unknown, missing, of a wrong shape or of a wrong dtype; or one
            whose values are not finite.
    """
    check_parameter_dtype(dtype)
    leaves = _leaves(config)
    if config.n_layer > len(tensors):  # a damaged configuration must not make a list of a billion names
        raise ValueError(
            f"{source}: {len(tensors)} tensors cannot be the n_layer={config.n_layer} blocks of the config"
        )
    slots = _slots(config, rules, leaves)
    problems = [f"{name}: unknown, {list(tensors[name].shape)}" for name in tensors if name not in slots]
    for name, slot in slots.items():
        if name not in tensors:
            problems.append(f"{name}: missing, expected {list(slot.shape)}")
        elif tuple(tensors[name].shape) != slot.shape:
            problems.append(f"{name}: has shape {list(tensors[name].shape)}, expected {list(slot.shape)}")
        elif tensors[name].dtype not in FLOAT_DTYPES:
            problems.append(f"{name}: is {tensors[name].dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
    unfilled = set(leaves) - {rule.path for rule in rules}
    problems += [f"parameter {path}: no tensor of this format fills it" for path in sorted(unfilled)]
    if problems:
        raise ValueError(f"{source} does not fit its configuration: {listed(problems)}")
    arrays = {path: aligned_empty(shape, dtype) for path, shape in leaves.items()}
    for name, tensor in tensors.items():
        target, layout = _view(arrays[slots[name].rule.path], slots[name]), slots[name].rule.layout
        if _lies_as_in_memory(tensor, target, layout):
            finite = _read_into(target, tensor, name)
        else:
            with np.errstate(over="ignore"):
                target[...] = _to_canonical(tensor.read(), layout, target.shape)
            finite = is_finite(target)
        if not finite:
            as_read = "" if tensor.dtype == dtype else f" in {dtype}"
            raise ValueError(
                f"{tensor.file}: tensor {name} holds values that are not finite numbers{as_read}"
            )
    params: Params = {}
    for path in leaves:
        keys = path.split(".")
        node = params
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = jax.device_put(arrays.pop(path))
    return params


def _lies_as_in_memory(tensor: LazyTensor, target: np.ndarray, layout: str) -> bool:
    same = numpy_dtype(tensor.dtype) == target.dtype and layout != "transposed"
    return same and tensor.offset is not None and target.flags.c_contiguous


def _read_into(target: np.ndarray, tensor: LazyTensor, name: str) -> bool:
    """Reads a tensor without a copy of it, and says whether all its values are finite."""
    flat = target.reshape(-1)
    finite = True
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(tensor.offset or 0)
        for start in range(0, flat.size, PIECE):
            piece = flat[start : start + PIECE]
            missing = piece.view(np.uint8).data
            while len(missing) and (count := file.readinto(missing)):
                missing = missing[count:]
            if len(missing):
                raise ValueError(f"{tensor.file} is cut short: tensor {name} is not whole")
            finite = finite and is_finite(piece)
    return finite


def export_tensors(
    config: GPT2Config, rules: Sequence[ParamRule], params: Params
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file out of parameters, in the order of the blocks: (name, array)."""
    leaves = _leaves(config)
    for name, slot in _slots(config, rules, leaves).items():
        node: Any = params
        for key in slot.rule.path.split("."):
            node = node[key]
        yield name, _from_canonical(_view(np.asarray(node), slot), slot)


def file_shapes(config: GPT2Config, rules: Sequence[ParamRule]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a file of this format has for an architecture, in order."""
    return {name: slot.shape for name, slot in _slots(config, rules, _leaves(config)).items()}


def _leaves(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    flat = jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]
    return {".".join(entry.key for entry in path): leaf.shape for path, leaf in flat}


def _slots(
    config: GPT2Config, rules: Sequence[ParamRule], leaves: Mapping[str, tuple[int, ...]]
) -> dict[str, _Slot]:
    slots = {}
    single = [rule for rule in rules if "{layer}" not in rule.name and rule.path in leaves]
    blocks = [rule for rule in rules if "{layer}" in rule.name]
    for rule in single:
        slots[rule.name] = _Slot(rule, None, _file_shape(config, rule, leaves[rule.path]))
    for layer in range(config.n_layer):
        for rule in blocks:
            shape = _file_shape(config, rule, leaves[rule.path][1:])
            slots[rule.name.format(layer=layer)] = _Slot(rule, layer, shape)
    return slots


def _file_shape(config: GPT2Config, rule: ParamRule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file of a parameter with this shape in one block."""
    if rule.part is not None:
        shape = (*shape[:-1], shape[-1] // 3)
    heads = (config.n_head, config.head_dim)
    shapes = {
        "same": shape,
        "transposed": shape[::-1],
        "heads_out": (*shape[:-1], *heads),
        "heads_in": (*heads, *shape[1:]),
        "leading_one": (1, *shape),
    }
    return shapes[rule.layout]


def _view(array: np.ndarray, slot: _Slot) -> np.ndarray:
    """The part of a whole parameter that one tensor of a file is."""
    view = array if slot.layer is None else array[slot.layer]
    if slot.rule.part is not None:
        width = view.shape[-1] // 3
        view = view[..., slot.rule.part * width : (slot.rule.part + 1) * width]
    return view


def _to_canonical(values: np.ndarray, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    return values.T if layout == "transposed" else values.reshape(shape)


def _from_canonical(values: np.ndarray, slot: _Slot) -> np.ndarray:
    return values.T if slot.rule.layout == "transposed" else values.reshape(slot.shape)


def check_parameter_dtype(dtype: str) -> None:
    """Raises ValueError where parameters can't be loaded in that dtype."""
    if dtype not in PARAMETER_DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; known: {', '.join(PARAMETER_DTYPES)}")


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a name, "bfloat16" included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def aligned_empty(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An uninitialised array at an address which jax on a CPU takes over without a copy."""
    size, alignment = numpy_dtype(dtype).itemsize * math.prod(shape), 64
    raw = np.empty(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(numpy_dtype(dtype)).reshape(shape)


def is_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    if (
        values.dtype.itemsize == 2
    ):  # all bits of the exponent are set; NumPy's own arithmetic of 16 bits is slow
        exponent = np.uint16(0x7C00 if values.dtype == np.float16 else 0x7F80)
        return not ((values.view(np.uint16) & exponent) == exponent).any()
    with np.errstate(all="ignore"):
        total = values.sum()  # much faster than isfinite, and a finite sum has finite terms
    return bool(np.isfinite(total)) or bool(np.isfinite(values).all())


def listed(problems: Sequence[str]) -> str:
    """Problems in one line, the first ones of many."""
    rest = len(problems) - PROBLEMS_SHOWN
    more = [f"... and {rest} more"] if rest > 0 else []
    return "; ".join([*problems[:PROBLEMS_SHOWN], *more])
