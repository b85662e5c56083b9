"""The one place that knows devices: what a device is, and what is chosen because of it.

`Device` holds facts, `Execution` the choices that follow from them. An `Execution` is part of `Precision`, a static
argument of every compiled program, so any device's program can be traced, and run, on any other device. Each choice
can be overridden by name: `Execution.for_device(device, dtype, attention="blockwise")`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gpt2jax.utils.validation import check_names, must_be, validated

# the share of an accelerator's memory that logits and their gradient may take at once; less does not make the loss
# slower before a chunk has fewer than some thousand rows
_LOGITS_SHARE = 8
# of a described device whose memory is not known
_SMALL_ACCELERATOR = 16 << 30
# of prompts at once on an accelerator: its products are busy, and gpt2-xl's activations take less than 1 GB
_PREFILL_TOKENS = 1 << 15
# float32 logits at once on a CPU: 100 MiB
_CPU_LOGITS_BYTES = 100 << 20


@dataclasses.dataclass(frozen=True)
class Device:
    """Facts about a device.

    Attributes:
        platform: "cpu", "cuda" (NVIDIA), "rocm" (AMD) or "tpu".
        compute_capability: (major, minor) of an NVIDIA GPU, or None.
        memory_bytes: of the device, or None if it is not known.
        name: as its maker calls it.
        is_here: this process can run programs on it; False for a device that is only described.
    """

    platform: str
    compute_capability: tuple[int, int] | None = None
    memory_bytes: int | None = None
    name: str = ""
    is_here: bool = False

    @classmethod
    def of(cls, device: Any = None) -> Device:
        """Read the facts from a device of jax, which may be a described one; default: the first local device."""
        device = jax.local_devices()[0] if device is None else device
        platform = device.platform
        if platform in ("gpu", "cuda", "rocm"):
            version = str(getattr(getattr(device, "client", None), "platform_version", ""))
            platform = "rocm" if platform == "rocm" or "rocm" in version.lower() else "cuda"
        capability = None
        if platform == "cuda":
            digits = str(getattr(device, "compute_capability", "") or "").partition(".")
            capability = (int(digits[0]), int(digits[2] or 0)) if digits[0].isdecimal() else None
        name, is_here = str(getattr(device, "device_kind", "")), device in jax.local_devices()
        return cls(platform, capability, _memory_bytes(device), name, is_here)

    @classmethod
    def of_backend(cls, backend: str) -> Device:
        """Return a device of jax's backend "cpu", "gpu", "cuda", "rocm" or "tpu" of which nothing more is known.

        A GPU then stands for a recent one of NVIDIA, of capability 8.0.
        """
        platform = "cuda" if backend == "gpu" else backend
        return cls(platform, (8, 0) if platform == "cuda" else None)


def _memory_bytes(device: Any) -> int | None:
    try:
        stats = device.memory_stats() or {}
    except Exception:  # a described device has no memory to ask; which exception that is differs by platform
        return None
    return stats.get("bytes_limit")


def host_memory_bytes() -> int | None:
    """Return the memory of this machine, or None if the system does not tell it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def find_backend_problem() -> str | None:
    """Return why jax has no device to compute on; None if it has one."""
    try:
        jax.local_devices()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # jax 0.10 fails an assertion if the only plugin finds no device
        # its own hint is to unset JAX_PLATFORMS, which ours says too
        reason = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0]
        named = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        if not named:
            return f"jax finds no device: {reason or 'it does not say why'}"
        problem = must_be("JAX_PLATFORMS", "empty, or name devices that jax finds here", named)
        return f"{problem}; {reason}" if reason else problem
    return None


@validated
@dataclasses.dataclass(frozen=True)
class Execution:
    """How a computation is carried out on a device; its result is the same up to rounding.

    Attributes:
        platform: of the device that the program is for.
        attention: "plain" holds all scores; "blockwise" holds those of a block of queries and computes them again in
            the backward pass; "cudnn" is the fused kernel of NVIDIA's library, for a causal mask without dropout in
            16 bits, and "blockwise" everywhere else.
        masked_attention: what takes rows with dropout of the probabilities or with several segments, unless `attention`
            is "plain". "pallas" is a fused kernel for 16 bits on NVIDIA GPUs; heads of more than 128 dimensions and
            arrays that a mesh of devices shards go "blockwise".
        attention_block: queries of a block; on a CPU few enough for the scores to fit its caches.
        blocks_masked_attention: the blockwise path takes rows with dropout or with several segments as well. A CPU
            holds all their scores, which is faster for the short rows that it trains on.
        has_narrow_results: products of 16-bit operands give 16-bit results, accumulated in float32 inside the kernel.
            A CPU is faster with float32 results; on an accelerator these would be written, read and cast.
        has_unrolled_layers: layers are written out. A loop compiles sooner, and copies what the backward pass needs
            into and out of stacks.
        has_bitcasts: 16-bit arrays that loops slice are kept as uint16, see `precision.bitcast_to_uint16`.
        logits_bytes: the most bytes of logits, of their dtype, at once in the loss.
        has_vocabulary_slices: the loss computes the gradient of its logits for a part of the vocabulary at a time.
        saves_gelu_derivative: GELU saves its derivative for the backward pass. An accelerator computes it from the
            input at no cost, because all that it waits for is memory.
        has_cpu_shapes: sums and products take the shapes that XLA:CPU computes fastest: sums of long rows are products
            with ones, and products of 16-bit operands have neither one row nor one axis of rows to sum over.
        prefill_tokens: the most tokens of prompts that go through the model at once, with the attention that training
            uses. 0: an eighth of the cache at a time, which reads what the cache holds; a CPU wants short runs, of
            which few programs serve all prompts.
        allows_tf32: float32 products round their operands to TF32 (10 bits of mantissa) on NVIDIA GPUs, to three
            bfloat16 parts on a TPU.
    """

    platform: str = "cpu"
    attention: Literal["plain", "blockwise", "cudnn"] = "plain"
    masked_attention: Literal["blockwise", "pallas"] = "blockwise"
    attention_block: int = 256
    blocks_masked_attention: bool = False
    has_narrow_results: bool = False
    has_unrolled_layers: bool = False
    has_bitcasts: bool = True
    logits_bytes: int = _CPU_LOGITS_BYTES
    has_vocabulary_slices: bool = True
    saves_gelu_derivative: bool = True
    has_cpu_shapes: bool = True
    prefill_tokens: int = 0
    allows_tf32: bool = False

    @classmethod
    def for_device(cls, device: Device, dtype: jnp.dtype, **overrides: Any) -> Execution:
        """Choose for a device and the dtype of products.

        Args:
            device: its facts.
            dtype: of the operands of matrix products.
            **overrides: fields of `Execution` to set by hand.

        Raises:
            TypeError: there is no such field.
        """
        check_names("choice", overrides, [field.name for field in dataclasses.fields(cls)])
        if device.platform == "cpu":
            return dataclasses.replace(cls(attention="blockwise"), **overrides)
        in_16_bits = jnp.dtype(dtype).itemsize == 2
        # an attention chosen by hand needs no trial
        name, may_fuse = jnp.dtype(dtype).name, in_16_bits and "attention" not in overrides
        is_fused = may_fuse and has_cudnn_attention(device, name)
        masks_fused = may_fuse and "masked_attention" not in overrides and has_flash_attention(device, name)
        memory = device.memory_bytes or _SMALL_ACCELERATOR
        choices = cls(
            platform=device.platform,
            attention="cudnn" if is_fused else "blockwise",
            masked_attention="pallas" if masks_fused else "blockwise",
            attention_block=512,
            blocks_masked_attention=True,
            has_narrow_results=in_16_bits,
            has_unrolled_layers=True,
            has_bitcasts=False,
            logits_bytes=memory // _LOGITS_SHARE // 2,  # as much again for their gradient
            has_vocabulary_slices=False,
            saves_gelu_derivative=False,
            has_cpu_shapes=False,
            prefill_tokens=_PREFILL_TOKENS,
        )
        return dataclasses.replace(choices, **overrides)

    def describe(self) -> str:
        """Return the choices in one line.

        A CPU's line names layers only if they are written out: training decides it by the size of its batches there
        (`train.unrolled.should_unroll`).
        """
        products = (
            "TF32 products" if self.allows_tf32 else "16-bit results" if self.has_narrow_results else ""
        )
        on_accelerator = "" if self.platform == "cpu" else "layers in a loop"
        layers = "layers written out" if self.has_unrolled_layers else on_accelerator
        attention = {"cudnn": "cuDNN attention"}.get(self.attention, f"{self.attention} attention")
        attention += " (Pallas with dropout or segments)" if self.masked_attention == "pallas" else ""
        logits = f"at most {self.logits_bytes / 1e6:,.0f} MB of logits"
        return ", ".join(part for part in (self.platform, attention, products, layers, logits) if part)


def has_cudnn_attention(device: Device, dtype: str = "bfloat16") -> bool:
    """Return whether cuDNN's attention kernel runs on a device: an NVIDIA GPU of capability 8.0 or more.

    On a device of this process it is tried; a warning says why it does not work.
    """
    if not _has_capability_8(device):
        return False
    return not device.is_here or _warns_unless_it_works(
        "attention is computed by blocks, because cuDNN's kernel does not work here: ",
        try_cudnn_attention(dtype),
    )


def has_flash_attention(device: Device, dtype: str = "bfloat16") -> bool:
    """Return whether the kernels of `flash_attention` run on a device: an NVIDIA GPU of capability 8.0 or more.

    On a device of this process they are tried; a warning says why they do not work. For another one JAX must be able to
    lower them without it, which JAX 0.11 and later cannot.
    """
    if not _has_capability_8(device):
        return False
    if not device.is_here:
        return can_lower_pallas()
    text = "attention with dropout or segments is computed by blocks, because its Pallas kernel does not work here: "
    return _warns_unless_it_works(text, try_flash_attention(dtype))


def _has_capability_8(device: Device) -> bool:
    return device.platform == "cuda" and (device.compute_capability or (0, 0)) >= (8, 0)


def _warns_unless_it_works(text: str, found: tuple[bool, str]) -> bool:
    works, why = found
    if not works:
        warnings.warn(text + why, stacklevel=3)
    return works


@functools.cache
def try_cudnn_attention(dtype: str) -> tuple[bool, str]:
    """Run cuDNN's attention on the device of this process, once; return whether it works, and why not.

    An incomplete installation passes every other test (jax issues 23227, 23833, 32430).
    """

    def loss(x: jax.Array) -> jax.Array:
        y = jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn")
        return y.astype(jnp.float32).sum()

    return _try(lambda: jax.block_until_ready(jax.jit(jax.grad(loss))(jnp.zeros((1, 128, 1, 64), dtype))))


@functools.cache
def try_flash_attention(dtype: str) -> tuple[bool, str]:
    """Run the kernels of `flash_attention` on the device of this process, once; return whether they work, and why not.

    Values and gradients, with dropout and segments, must be those of plain operations.
    """

    def compare() -> None:
        # loads Pallas, which a CPU does not need
        from gpt2jax.ops.flash_trial import check_kernels

        check_kernels(dtype)

    return _try(compare)


def _try(run: Callable[[], Any]) -> tuple[bool, str]:
    """Return whether a function runs, and the first line of its error."""
    try:
        run()
    except Exception as error:  # whatever it is, there is another way to compute attention
        return False, (str(error).strip().splitlines() or [type(error).__name__])[0]
    return True, ""


@functools.cache
def can_lower_pallas() -> bool:
    """Return whether JAX lowers a Pallas kernel for an NVIDIA GPU here, tried once."""

    def copy(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    def lower() -> None:
        from jax.experimental import pallas
        from jax.experimental.pallas import triton

        x = jax.ShapeDtypeStruct((16,), jnp.float32)
        call = pallas.pallas_call(copy, out_shape=x, compiler_params=triton.CompilerParams())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Pallas for Triton, since jax 0.11
            jax.jit(call).trace(x).lower(lowering_platforms=("cuda",))

    return _try(lower)[0]


# what the functions of `ops` do unless they are told otherwise: the programs for XLA:CPU
CPU = Execution()
