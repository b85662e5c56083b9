"""What a compiled program must cost at least on a GPU: kernels, bytes moved, FLOPs, and the time that these need.

    python benchmarks/roofline.py PROGRAM.txt                       what compiled.as_text() gave, for an H100
    python benchmarks/roofline.py PROGRAM.txt --device t4 --top 15  with the dearest kernels

The text of the program is read, so no GPU is needed. A loop counts as often as XLA says that it runs; one of unknown
length (the loop over new tokens) counts once, so that its figures are those of one token. Of a conditional the dearest
branch counts. At a conditional and at a loop of unknown length the host waits for the device.

The time is a bound from below, kernel by kernel: bytes by bandwidth or FLOPs by peak, whichever takes longer, and a
launch of 2 us for each. Real kernels reach 70 to 90 % of it. Without a GPU XLA picks the kernels of its products
without trying them out, and sorts by a slow fallback: hold the figures of two programs against each other. FLOPs of a
TPU's program are not counted, because XLA:TPU turns products into convolutions.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gpt2jax.plan.devices import DEVICES, Accelerator, find_device

LAUNCH_SECONDS = 2e-6
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
WIDTHS |= {"f8e4m3fn": 1, "f8e5m2": 1, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
# operations that no kernel runs for
FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
}
FREE |= {"opt-barrier"}
SLICES = ("dynamic-slice", "slice", "gather")
# products of T * T * H in each kernel of gpt2jax.ops.flash_attention
FLASH_PRODUCTS = {
    "flash_attention_forward": 2,
    "flash_attention_query_gradient": 3,
    "flash_attention_key_gradient": 4,
}


class Instruction(NamedTuple):
    """One line of a computation: its name, the type of its result, the operation, and the line from there on."""

    name: str
    type: str
    operation: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    def named(self, pattern: str) -> str:
        """Return the first group of a pattern in its attributes, or ""."""
        found = re.search(pattern, self.rest)
        return found.group(1) if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass
class Cost:
    """Sums over kernels."""

    kernels: int = 0
    bytes: float = 0
    flops: float = 0
    seconds: float = 0

    def add(self, other: Cost) -> None:
        """Add the sums of other kernels."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass
class Roofline:
    """The cost of a program.

    Attributes:
        kinds: by kind of kernel.
        dearest: (seconds, how often, bytes, description) of each kernel.
        waits: times that the host waits for the device.
        peak: FLOP/s of the device.
    """

    peak: float
    kinds: dict[str, Cost] = dataclasses.field(default_factory=lambda: collections.defaultdict(Cost))
    dearest: list[tuple[float, int, float, str]] = dataclasses.field(default_factory=list)
    waits: int = 0

    @property
    def total(self) -> Cost:
        """Sums over all kernels."""
        total = Cost()
        for cost in self.kinds.values():
            total.add(cost)
        return total

    @property
    def launch_seconds(self) -> float:
        """Time of the launches."""
        return self.total.kernels * LAUNCH_SECONDS

    @property
    def utilisation(self) -> float:
        """The most of the peak that the program can reach."""
        seconds = self.total.seconds + self.launch_seconds
        return self.total.flops / self.peak / seconds if seconds else 0.0

    def add(self, other: Roofline) -> None:
        """Add a part of the program."""
        for kind, cost in other.kinds.items():
            self.kinds[kind].add(cost)
        self.dearest += other.dearest
        self.waits += other.waits


def read_roofline(text: str, device: Accelerator, dtype: str = "bfloat16") -> Roofline:
    """Read the cost of a program, whose products have operands of `dtype`, from its text."""
    computations, entry = _parse(text)
    return _Reader(computations, device.bandwidth, device.flops[dtype]).walk(entry, 1)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return all computations by name, and the name of the first one to run."""
    found: dict[str, Computation] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if start := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
            current = found[start.group(2)] = {}
            entry = start.group(2) if start.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (parts := re.match(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)):
            kind, rest = _split_type(parts.group(2))
            if operation := re.match(r"([\w\-]+)\(", rest):
                name = parts.group(1)
                current[name] = Instruction(name, kind, operation.group(1), rest)
    return found, entry


def _split_type(line: str) -> tuple[str, str]:
    """Split the type at the beginning of a line, which may be a tuple of types, from the rest."""
    if not line.startswith("("):
        kind, _, rest = line.partition(" ")
        return kind, rest
    depths = itertools.accumulate((character == "(") - (character == ")") for character in line)
    end = next(place for place, depth in enumerate(depths, 1) if depth == 0)
    return line[:end], line[end:].strip()


def _dims(kind: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", kind)
    return [int(n) for n in found.group(1).split(",") if n] if found else []


def _nbytes(kind: str) -> int:
    shapes = re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", kind)
    return sum(
        WIDTHS[t] * math.prod(int(n) for n in dims.split(",") if n) for t, dims in shapes if t in WIDTHS
    )


class _Reader:
    """Reads one program."""

    def __init__(self, computations: dict[str, Computation], bandwidth: float, peak: float):
        self.computations, self.bandwidth, self.peak = computations, bandwidth, peak

    def walk(self, name: str, times: int) -> Roofline:
        """Return the cost of a computation that runs so often."""
        found = Roofline(self.peak)
        lines = self.computations[name]
        for line in lines.values():
            if line.operation == "while":
                trips = line.named(r'"known_trip_count":\{"n":"(\d+)"')
                found.waits += 0 if trips else times
                for part in ("body", "condition"):
                    found.add(self.walk(line.named(rf"{part}=%?([\w.\-]+)"), times * int(trips or 1)))
            elif line.operation == "conditional":
                found.waits += times
                parts = [self.walk(branch, times) for branch in _branches(line)]
                found.add(max(parts, key=lambda part: part.total.seconds + part.launch_seconds))
            elif line.operation == "call":
                found.add(self.walk(line.named(r"to_apply=%?([\w.\-]+)"), times))
            elif line.operation not in FREE:
                self._add_kernel(found, lines, line, times)
        return found

    def _add_kernel(self, found: Roofline, lines: Computation, line: Instruction, times: int) -> None:
        label, size, flops = self._kernel(lines, line)
        seconds = times * max(size / self.bandwidth, flops / self.peak)
        found.kinds[label].add(Cost(times, times * size, times * flops, seconds))
        source = line.named(r'op_name="([^"]*)"')[-80:]
        found.dearest.append((seconds, times, size, f"{line.name} {line.type[:60]} {source}"))

    def _kernel(self, lines: Computation, line: Instruction) -> tuple[str, float, float]:
        """Return label, bytes and FLOPs of a kernel."""
        types = [lines[name].type for name in line.operands if name in lines]
        size, flops, label = _nbytes(line.type) + sum(map(_nbytes, types)), 0.0, line.operation
        if label == "fusion":
            fused = self.computations[line.named(r"calls=%?([\w.\-]+)")]
            size = _fusion_bytes(fused)
            flops = sum(_product_flops(fused, one) for one in fused.values() if one.operation == "dot")
            label = "fusion with a product" if flops else label
        elif label == "custom-call":
            label = line.named(r'custom_call_target="([^"]+)"')
            if "gemm" in label or "matmul" in label:
                flops = _product_flops(lines, line)
            elif "fmha" in label:  # causal: half of all scores
                dims = _dims(types[0])
                flops = 2 * math.prod(dims) * max(dims) * (2.5 if "Backward" in label else 1)
            elif (kernel := line.named(r"(flash_attention_\w+)")) in FLASH_PRODUCTS:
                label, dims = kernel, _dims(types[0])  # [B, T, N, H], causal as well
                flops = FLASH_PRODUCTS[kernel] * math.prod(dims) * dims[1]
        elif label == "dot":
            flops = _product_flops(lines, line)
        elif label in SLICES:
            size = 2 * _nbytes(line.type)
        return label, size, flops


def _branches(line: Instruction) -> list[str]:
    several = line.named(r"branch_computations=\{([^}]*)\}")
    pattern = r"[\w.\-]+" if several else r"(?:true|false)_computation=%?([\w.\-]+)"
    return re.findall(pattern, several or line.rest)


def _product_flops(lines: Computation, line: Instruction) -> float:
    contracted = line.named(r'"lhs_contracting_dimensions":\["?(\d+)') or line.named(
        r"lhs_contracting_dims=\{(\d+)"
    )
    left = lines.get(line.operands[0]) if line.operands else None
    if not contracted or left is None or not _dims(left.type):
        return 0.0
    return 2.0 * math.prod(_dims(line.type)) * _dims(left.type)[int(contracted)]


def _fusion_bytes(lines: Computation) -> int:
    """Return the bytes that a fusion moves; of slices, and of what is updated in place, only that part counts."""
    parameters = [line for line in lines.values() if line.operation == "parameter" and _nbytes(line.type)]
    read = sum(round(_nbytes(line.type) * _needed(lines, line)) for line in parameters)

    def written(line: Instruction) -> int:
        inner = [lines[name] for name in line.operands if name in lines]
        if line.operation == "tuple":
            return sum(map(written, inner))
        if line.operation == "parameter":
            return 0
        if line.operation == "bitcast" and inner and inner[0].operation == "dynamic-update-slice":
            return written(inner[0])
        if line.operation == "dynamic-update-slice" and len(inner) > 1:
            return _nbytes(inner[1].type)
        return _nbytes(line.type)

    return read + (written(list(lines.values())[-1]) if lines else 0)


def _needed(lines: Computation, array: Instruction) -> float:
    """Return the part of an array that a fusion needs; a conversion needs no more than the slices behind it."""
    parts, result = [0.0], list(lines)[-1]
    for line in lines.values():
        for place, name in enumerate(line.operands):
            if name != array.name:
                continue
            if line.operation in SLICES and place == 0:
                parts.append(_nbytes(line.type) / _nbytes(array.type))
            elif line.operation in ("convert", "bitcast") and line.name != result:
                parts.append(_needed(lines, line))
            elif line.operation != "dynamic-update-slice" or place:
                parts.append(1.0)
    return max(parts)


def lines_of(found: Roofline, top: int = 0) -> Iterator[str]:
    """Yield lines about the kinds of kernels and the `top` dearest ones."""
    for label, cost in sorted(found.kinds.items(), key=lambda item: -item[1].seconds)[:12]:
        figures = f"{cost.bytes / 1e9:9.2f} GB {cost.flops / 1e12:8.3f} TFLOP {cost.seconds * 1e3:8.2f} ms"
        yield f"{label:40s} {cost.kernels:7d} kernels {figures}"
    total = found.total
    yield (
        f"all: {total.kernels} kernels, {total.bytes / 1e9:.1f} GB, {total.flops / 1e12:.2f} TFLOP, "
        f"{total.seconds * 1e3:.2f} ms + launches {found.launch_seconds * 1e3:.2f} ms; the host waits "
        f"{found.waits} times; at most {found.utilisation:.2f} of the peak"
    )
    for seconds, times, size, text in sorted(found.dearest, reverse=True)[:top]:
        yield f"  {seconds * 1e3:8.2f} ms x{times:5d} {size / 1e6:9.1f} MB  {text}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", type=Path)
    parser.add_argument("--device", default="h100", choices=DEVICES)
    parser.add_argument("--top", type=int, default=0, help="show so many of the dearest kernels")
    options = parser.parse_args()
    program = options.program.read_text(encoding="utf-8")
    print("\n".join(lines_of(read_roofline(program, find_device(options.device)), options.top)))
