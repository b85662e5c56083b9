"""Between the tensors of a file and the parameter dict: one table of rules per format.

A format reader delivers `{name: LazyTensor}`, of which no value has been read. `load_params` checks all names, shapes
and dtypes against the table, reports every problem at once, and then reads one tensor at a time into its place.
`export_tensors` is the way back. Blocks are separate in every file and stacked along a leading layer axis here.
Adapters are read by the same two steps, `check_tensors` and `read_all`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import Params, abstract_params
from gpt2jax.utils.limits import check_in_memory
from gpt2jax.utils.notices import enumerate_names, notice
from gpt2jax.utils.validation import check, one_of

FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")
PARAMETER_DTYPES = ("float32", "bfloat16", "float16")
MAX_PROBLEMS_SHOWN = 20
MAX_NAME_LENGTH = 1000
CHUNK_SIZE = 1 << 18  # numbers read at once: few enough to be in the cache still when they are checked

Shape = tuple[int, ...]
Layout = Literal["same", "transposed", "heads_out", "heads_in", "leading_one"]


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file that has not been read.

    Attributes:
        shape: as in the file.
        dtype: NumPy's name of the dtype; "bfloat16" too.
        read: returns the values.
        file: the file that holds it, for messages; "" if the format implies the values and no file holds them.
        offset: where in that file the values begin, if they lie there as in memory and need no other check; else None.
    """

    shape: Shape
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
        layout: how the file stores one block's parameter [in, out] or [out]:
            "same";
            "transposed": [out, in];
            "heads_out": the output axis split in two, [..., N, H];
            "heads_in": the input axis split in two, [N, H, out];
            "leading_one": [1, in, out].
        part: 0, 1 or 2 if the tensor is only that third of the output axis (query, key, value), else None.
    """

    name: str
    path: str
    layout: Layout = "same"
    part: int | None = None


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """The place of one tensor: its rule, its block (None: not in a block), and its shape in the file."""

    rule: ParamRule
    layer: int | None
    shape: Shape

    def select(self, array: np.ndarray) -> np.ndarray:
        """Return the view of a whole (stacked) parameter that this tensor fills."""
        view = array if self.layer is None else array[self.layer]
        if self.rule.part is not None:
            width = view.shape[-1] // 3
            view = view[..., self.rule.part * width : (self.rule.part + 1) * width]
        return view


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
        """Return (config, params), blocks stacked; raises as `load_params`."""
        return self.config, load_params(self.config, self.rules, self.tensors, self.name, dtype)


def load_params(
    config: GPT2Config,
    rules: Sequence[ParamRule],
    tensors: Mapping[str, LazyTensor],
    source: str,
    dtype: str = "float32",
) -> Params:
    """Return the parameters of `config`, read from the tensors of a file.

    Host memory holds the parameters and one tensor; less if tensors can be read straight into their place.

    Args:
        config: the architecture that the file is said to have.
        rules: the format's table; rules of parameters that the architecture does not have are left out.
        tensors: by name; none of them has been read.
        source: name of the file or folder, for messages.
        dtype: of the parameters, one of `PARAMETER_DTYPES`; values are rounded to it as they are read.

    A notice names tensors with NaN or infinite values.

    Raises:
        ValueError: naming all tensors that are unknown, missing, of a wrong shape or of a wrong dtype; or one
            with values that are too large for `dtype`.
    """
    check_parameter_dtype(dtype)
    leaves = _leaf_shapes(config)
    if config.n_layer > len(tensors):  # a damaged configuration must not make a list of a billion names
        raise ValueError(
            f"{source} has {len(tensors)} tensors, too few for n_layer={config.n_layer} of its config"
        )
    places = _places(config, rules, leaves)
    unfilled = sorted(set(leaves) - {rule.path for rule in rules})
    check_tensors(
        f"{source} does not fit its configuration",
        tensors,
        {name: place.shape for name, place in places.items()},
        required=places,
        other_problems=[f"parameter {path}: no tensor of this format fills it" for path in unfilled],
    )
    # a file may name the same numbers for many tensors
    size = sum(os.path.getsize(file) for file in {tensor.file for tensor in tensors.values()} - {""})
    needed = sum(math.prod(shape) for shape in leaves.values()) * numpy_dtype(dtype).itemsize
    check_in_memory(source, needed, size)
    arrays = {path: aligned_empty(shape, dtype) for path, shape in leaves.items()}
    read_all(
        source,
        {
            name: (places[name].select(arrays[places[name].rule.path]), tensor, places[name].rule.layout)
            for name, tensor in tensors.items()
        },
    )
    params: Params = {}
    for path in leaves:
        *parents, key = path.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = jax.device_put(arrays.pop(path))
    return params


def check_tensors(
    subject: str,
    tensors: Mapping[str, LazyTensor],
    shapes: Mapping[str, Shape],
    required: Iterable[str],
    other_problems: Sequence[str] = (),
) -> None:
    """Check the names, shapes and dtypes of tensors, and that those that are needed are there.

    Args:
        subject: the beginning of the message.
        tensors: by name.
        shapes: of all tensors that may be there.
        required: names of those that must be there.
        other_problems: what the caller found, for the same message.

    Raises:
        ValueError: naming all problems, or the first `MAX_PROBLEMS_SHOWN` of them.
    """
    needed = set(required)
    problems = [f"{name}: unknown, {list(tensors[name].shape)}" for name in tensors if name not in shapes]
    for name, shape in shapes.items():
        if name not in tensors:
            problems += [f"{name}: missing, expected {list(shape)}"] if name in needed else []
        elif tuple(tensors[name].shape) != shape:
            problems.append(f"{name}: has shape {list(tensors[name].shape)}, expected {list(shape)}")
        elif tensors[name].dtype not in FLOAT_DTYPES:
            problems.append(f"{name}: is {tensors[name].dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
    problems += other_problems
    if problems:
        rest = len(problems) - MAX_PROBLEMS_SHOWN
        more = [f"... and {rest} more"] if rest > 0 else []
        raise ValueError(f"{subject}: {'; '.join([*problems[:MAX_PROBLEMS_SHOWN], *more])}")


def read_all(source: str, targets: Mapping[str, tuple[np.ndarray, LazyTensor, Layout]]) -> None:
    """Read tensors into arrays, rounded to the arrays' dtypes; a notice names those with NaN or infinite values.

    Args:
        source: name of the file or folder, for messages.
        targets: by the name of a tensor: where its values go, the tensor, and its layout.

    Raises:
        ValueError: a value is too large for the array's dtype, or a file is cut short or damaged.
    """
    broken = [name for name, target in targets.items() if not _read_into(name, *target)]
    if broken:
        tensors = f"{len(broken)} of {len(targets)} tensors hold"
        notice(f"{source}: {tensors} values that are not finite numbers: {enumerate_names(broken)}")


def _read_into(name: str, target: np.ndarray, tensor: LazyTensor, layout: Layout) -> bool:
    """Read a tensor without a copy if the file allows it; return True if all its values are finite."""
    same_dtype = numpy_dtype(tensor.dtype) == target.dtype
    if tensor.offset is not None and same_dtype and layout != "transposed" and target.flags.c_contiguous:
        finite = _read_in_chunks(target, name, tensor, tensor.offset)
    else:
        values = tensor.read()
        with np.errstate(over="ignore"):
            target[...] = values.T if layout == "transposed" else values.reshape(target.shape)
        del values  # the check of a 16-bit tensor needs memory too
        finite = is_finite(target)
        if not finite and not same_dtype and is_finite(tensor.read()):
            raise ValueError(
                f"{tensor.file}: tensor {name} holds values that are not finite numbers in {target.dtype}"
            )
    return finite


def _read_in_chunks(target: np.ndarray, name: str, tensor: LazyTensor, offset: int) -> bool:
    """Read a tensor straight into its place; return True if all its values are finite."""
    flat = target.reshape(-1)
    finite = True
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(offset)
        for start in range(0, flat.size, CHUNK_SIZE):
            chunk = flat[start : start + CHUNK_SIZE]
            missing = chunk.view(np.uint8).data
            while len(missing) and (count := file.readinto(missing)):
                missing = missing[count:]
            if len(missing):
                raise ValueError(f"{tensor.file} is cut short: tensor {name} is not whole")
            finite = finite and is_finite(chunk)
    return finite


def export_tensors(
    config: GPT2Config, rules: Sequence[ParamRule], params: Params
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the (name, array) of a file's tensors in the order of the blocks; views of `params` where possible."""
    for name, place in _places(config, rules, _leaf_shapes(config)).items():
        node: Any = params
        for key in place.rule.path.split("."):
            node = node[key]
        values = place.select(np.asarray(node))
        yield name, values.T if place.rule.layout == "transposed" else values.reshape(place.shape)


def file_shapes(config: GPT2Config, rules: Sequence[ParamRule]) -> dict[str, Shape]:
    """Return names and shapes of the tensors that a file of this format has for an architecture, in order."""
    return {name: place.shape for name, place in _places(config, rules, _leaf_shapes(config)).items()}


def _leaf_shapes(config: GPT2Config) -> dict[str, Shape]:
    flat = jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]
    return {".".join(entry.key for entry in path): leaf.shape for path, leaf in flat}


def _places(
    config: GPT2Config, rules: Sequence[ParamRule], leaves: Mapping[str, Shape]
) -> dict[str, TensorPlace]:
    """Return the place of each tensor by its name: those outside the blocks, then block by block."""
    places = {}
    for rule in rules:
        if "{layer}" not in rule.name and rule.path in leaves:
            places[rule.name] = TensorPlace(rule, None, _file_shape(config, rule, leaves[rule.path]))
    for layer in range(config.n_layer):
        for rule in rules:
            if "{layer}" in rule.name:
                shape = _file_shape(config, rule, leaves[rule.path][1:])
                places[rule.name.format(layer=layer)] = TensorPlace(rule, layer, shape)
    return places


def _file_shape(config: GPT2Config, rule: ParamRule, shape: Shape) -> Shape:
    """Return the shape in the file of a parameter that has `shape` in one block."""
    if rule.part is not None:
        shape = (*shape[:-1], shape[-1] // 3)
    heads = (config.n_head, config.head_dim)
    shapes: dict[Layout, Shape] = {
        "same": shape,
        "transposed": shape[::-1],
        "heads_out": (*shape[:-1], *heads),
        "heads_in": (*heads, *shape[1:]),
        "leading_one": (1, *shape),
    }
    return shapes[rule.layout]


def check_parameter_dtype(dtype: str) -> None:
    """Raise ValueError if parameters can't be loaded in that dtype."""
    check("dtype", dtype, one_of(PARAMETER_DTYPES))


def numpy_dtype(name: str) -> np.dtype:
    """Return the NumPy dtype of a name, "bfloat16" included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def aligned_empty(shape: Shape, dtype: str) -> np.ndarray:
    """Return an uninitialised array at an address that jax on a CPU takes over without a copy."""
    size, alignment = numpy_dtype(dtype).itemsize * math.prod(shape), 64
    raw = np.empty(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(numpy_dtype(dtype)).reshape(shape)


def is_finite(values: np.ndarray) -> bool:
    """Return True if no value is NaN or infinite."""
    if (
        values.dtype.itemsize == 2
    ):  # NumPy's own arithmetic of 16 bits is slow: look at the bits of the exponent
        exponent = np.uint16(0x7C00 if values.dtype == np.float16 else 0x7F80)
        return not ((values.view(np.uint16) & exponent) == exponent).any()
    with np.errstate(all="ignore"):
        total = values.sum()  # much faster than isfinite, and a finite sum has finite terms
    return bool(np.isfinite(total)) or bool(np.isfinite(values).all())
