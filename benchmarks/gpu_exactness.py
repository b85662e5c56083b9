"""What benchmarks/gpu.py checks on a device: figures that must stay within a limit, each from a function of its own.

The reference is a GPT-2 in float64 NumPy, and torch in float64 on the CPU where that is installed. Limits are those
that a rounding of the operands explains, not what was seen on some card; gradients in 16 bits are held against those of
the plain JAX step of gpu_plain.py, whose error depends on the parameters as theirs does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2jax.doctor.reference import reference_gradient, reference_logits, to_float64
from gpt2jax.model.config import GPT2Config

NO_DROPOUT: dict[str, Any] = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
CONFIG = GPT2Config(vocab_size=1000, n_positions=128, n_embd=128, n_layer=2, n_head=2, **NO_DROPOUT)
ROWS, LENGTH = 4, 128
PROMPTS, NEW_TOKENS = [[5, 700, 31, 2], [9] * 20, [412]], 32
NOISE = 0.2
# of the norm of all logits or float32 gradients, and of losses: some units of the last place of the operands (2^-24,
# 2^-11, 2^-8)
LIMITS = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}
# how often the error of the plain step a gradient in 16 bits may have: this model's gradients are about 1e-2 off in
# float16 and 1e-1 in bfloat16 there, and at most 0.75 times that here
PLAIN_FACTOR = 1.5

# name of a figure, the figure, its limit
Found = tuple[str, float, float]


def check_all() -> Iterator[dict[str, Any]]:
    """Yield the figures of all checks; a check that fails gives its error."""
    checks = (logits, gradients, masked_attention, torch_gradients, greedy, resume, float16_training)
    yield from _results(checks)


def smoke_checks() -> Iterator[dict[str, Any]]:
    """Yield the figures of those that take least."""
    small = functools.partial(masked_attention, ("bfloat16",), (1, 1, 40, 64), is_interpreted=True)
    yield from _results((logits, functools.partial(gradients, {"float32": LIMITS["float32"]}), small))


def _results(checks: Sequence[Callable[[], Iterator[Found]]]) -> Iterator[dict[str, Any]]:
    for check in checks:
        try:
            for name, value, limit in check():
                is_right = bool(value <= limit)  # not so for nan
                yield {"name": name, "value": float(value), "limit": limit, "passed": is_right}
        except ImportError as error:
            yield {"name": getattr(check, "__name__", "a check"), "left out": str(error)}
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            yield {"name": getattr(check, "__name__", "a check"), "error": text, "passed": False}


# ---- the model and its inputs ----


@functools.cache
def model() -> Any:
    """A model with noise on every parameter, so that biases and LayerNorms matter."""
    import jax

    from gpt2jax.language_model import from_config

    plain, rng = from_config(CONFIG), np.random.default_rng(0)
    noisy = jax.tree.map(
        lambda x: jax.numpy.asarray(x + NOISE * rng.standard_normal(x.shape, np.float32)), plain.params
    )
    return dataclasses.replace(plain, params=noisy)


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets [B, T]."""
    ids = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (ROWS, LENGTH + 1), dtype=np.int32)
    return ids[:, :-1], ids[:, 1:]


def error(found: Any, right: Any) -> float:
    """The norm of the difference, by that of the right values."""
    found = np.asarray(found, np.float64)
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


@functools.cache
def gradient(dtype: str, attention: str | None = None) -> tuple[float, Any]:
    """Loss and gradient of gpt2jax on this device, as a training step computes them."""
    import jax
    from gpu_contenders import precision

    from gpt2jax.model.gpt2 import hidden_states, lm_head_weight
    from gpt2jax.ops.cross_entropy import cross_entropy

    chosen = precision(dtype, **({"attention": attention} if attention else {}))
    tokens, targets = batch()
    scale = loss_scale(dtype)

    @jax.jit
    def of_loss(params):
        def loss(params):
            hidden = hidden_states(params, CONFIG, tokens, precision=chosen)
            weights = np.full(targets.shape, 1 / targets.size, np.float32)
            total, _ = cross_entropy(hidden, lm_head_weight(params), targets, weights * scale, chosen)
            return total

        value, gradients = jax.value_and_grad(loss)(params)
        return value / scale, jax.tree.map(lambda g: g / scale, gradients)

    value, gradients = of_loss(model().params)
    return float(value), to_float64(gradients)


def loss_scale(dtype: str) -> float:
    """float16 needs its gradients in range, which a training step sees to."""
    return 2.0**10 if dtype == "float16" else 1.0


@functools.cache
def gradient_limit(dtype: str) -> float:
    """The error that a gradient may have: in 16 bits a multiple of the plain step's beside float32."""
    import gpu_plain
    import jax
    import jax.numpy as jnp

    if dtype == "float32":
        return LIMITS[dtype]
    scale = loss_scale(dtype)

    tokens, targets = map(jnp.asarray, batch())

    @jax.jit
    @jax.grad
    def plain(params):
        return scale * gpu_plain.mean_loss(params, tokens, targets, CONFIG.n_head, jnp.dtype(dtype), "xla")

    found = jax.tree.map(lambda g: g / scale, plain(plain_params(model().params)))
    return PLAIN_FACTOR * error(flat(found), flat(plain_params(gradient("float32")[1])))


def plain_params(params: Any) -> Any:
    """Parameters, or their gradients, in the structure of gpu_plain.py."""
    import jax

    def layer(index: int) -> Any:
        h = jax.tree.map(lambda x: x[index], params["h"])
        kernels = {"qkv": h["attn"]["c_attn"], "out": h["attn"]["c_proj"], "up": h["mlp"]["c_fc"]}
        return kernels | {"down": h["mlp"]["c_proj"], "ln_1": h["ln_1"], "ln_2": h["ln_2"]}

    tables = {name: params[name]["embedding"] for name in ("wte", "wpe")}
    return tables | {"layers": [layer(i) for i in range(CONFIG.n_layer)], "ln_f": params["ln_f"]}


def flat(tree: Any) -> np.ndarray:
    """All numbers of a tree, float64."""
    import jax

    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def attentions(dtype: str) -> tuple[str | None, ...]:
    """The kinds of attention to try: what is chosen here, and what any device has."""
    return (None,) if dtype == "float32" else (None, "blockwise", "plain")


# ---- checks ----


def logits() -> Iterator[Found]:
    """Logits beside float64 NumPy."""
    right = reference_logits(model().params, CONFIG, batch()[0])
    yield "logits float32", error(model().logits(batch()[0]), right), LIMITS["float32"]


def gradients(limits: Mapping[str, float] = LIMITS) -> Iterator[Found]:
    """Loss and gradients beside float64 NumPy; gradients in 16 bits beside float32."""
    right_loss, right = reference_gradient(model().params, CONFIG, *batch())
    for dtype, limit in limits.items():
        for attention in attentions(dtype):
            loss, found = gradient(dtype, attention)
            name = f"{dtype}, attention {attention or 'as chosen'}"
            yield f"loss {name}", abs(loss / right_loss - 1), limit
            off = error(flat(found), flat(right if dtype == "float32" else gradient("float32")[1]))
            yield f"gradient {name}", off, gradient_limit(dtype)


def masked_attention(
    dtypes: Sequence[str] = ("float16", "bfloat16"),
    shape: tuple[int, int, int, int] = (2, 3, 500, 64),
    is_interpreted: bool = False,
) -> Iterator[Found]:
    """Output and gradients of the kernels for dropout and segments beside plain operations with the same mask."""
    import jax.numpy as jnp
    from gpu_contenders import precision

    for dtype in dtypes:
        if not is_interpreted and precision(dtype).execution.masked_attention != "pallas":
            raise ImportError(
                "the Pallas kernels are for NVIDIA GPUs of capability 8.0 or more; a warning says more"
            )
        from gpt2jax.ops.flash_attention import FlashForm
        from gpt2jax.ops.flash_trial import kernel_errors

        for rate, segments in ((0.1, 1), (0.1, 3), (0.0, 3)) if not is_interpreted else ((0.1, 3),):
            form = FlashForm(jnp.dtype(dtype), rate, is_interpreted=is_interpreted)
            for name, off in kernel_errors(form, shape, segments).items():
                yield f"{name} of attention {dtype}, dropout {rate}, {segments} segments", off, LIMITS[dtype]


def torch_gradients() -> Iterator[Found]:
    """All gradients beside those of transformers' GPT-2 in float64 on the CPU."""
    import torch
    from transformers import GPT2Config as HFConfig
    from transformers import GPT2LMHeadModel

    settings = HFConfig(**CONFIG.to_hf(), attn_implementation="eager")
    peer, params = GPT2LMHeadModel(settings).double().eval(), to_float64(model().params)
    pairs = {"transformer.wte.weight": ("wte", "embedding"), "transformer.wpe.weight": ("wpe", "embedding")}
    found = {name: params[a][b] for name, (a, b) in pairs.items()}
    found |= _torch_names(params)
    peer.load_state_dict({name: torch.tensor(x) for name, x in found.items()}, strict=False)
    tokens, targets = (torch.tensor(x, dtype=torch.long) for x in batch())
    logits = peer(tokens, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    right = {name: p.grad.numpy() for name, p in peer.named_parameters() if p.grad is not None}
    for dtype in LIMITS:
        _, own = gradient(dtype)
        names = {name: own[a][b] for name, (a, b) in pairs.items()} | _torch_names(own)
        names = {name: x for name, x in names.items() if name in right}
        off = error(flat(names), flat({name: right[name] for name in names}))
        yield f"gradient {dtype} beside torch", off, gradient_limit(dtype)


def _torch_names(params: Any) -> dict[str, np.ndarray]:
    """The parameters of blocks and last LayerNorm by transformers' names."""
    import jax

    named = {
        "transformer.ln_f.weight": params["ln_f"]["scale"],
        "transformer.ln_f.bias": params["ln_f"]["bias"],
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["h"]):
        *modules, last = (part.key for part in path)
        last = {"kernel": "weight", "scale": "weight"}.get(last, last)
        named |= {f"transformer.h.{i}.{'.'.join(modules)}.{last}": leaf[i] for i in range(CONFIG.n_layer)}
    return named


def greedy() -> Iterator[Found]:
    """The share of tokens of greedy generation that differ from a CPU's."""
    here = generate_greedily()
    command = [sys.executable, __file__]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["the CPU's process ended"])[-1])
    there = json.loads(done.stdout.strip().splitlines()[-1])
    yield "greedy tokens that differ from a CPU's", np.mean(np.array(here) != np.array(there)), 0.0


def generate_greedily() -> list[list[int]]:
    from gpt2jax.generation.generator import Generator

    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "stop_token_ids": ()}
    return [row.token_ids for row in Generator(model(), dtype="float32").generate(PROMPTS, **settings)]


def finetune(dtype: str, output: Path | None = None, **settings: Any) -> Any:
    import gpt2jax

    texts = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (64, 40)).tolist()
    given: dict[str, Any] = {"steps": 6, "batch_size": 4, "sequence_length": 64, "learning_rate": 1e-3}
    config = gpt2jax.FinetuneConfig(**given, compute_dtype=dtype, log_every=1)  # type: ignore[arg-type]
    return gpt2jax.finetune(model(), texts, config, output=output, progress=False, **settings)


def resume() -> Iterator[Found]:
    """The number of parameters of a run that differ in any bit if it is stopped and resumed."""
    import jax

    from gpt2jax.train.trainer import Trainer

    train_step = Trainer.train_step

    def stopping(self: Trainer) -> None:
        if self.step == 3:
            raise KeyboardInterrupt
        train_step(self)

    whole = finetune("bfloat16").model.params
    again = finetune("bfloat16").model.params
    yield "parameters that differ in a second run", _differing(whole, again), 0.0
    with tempfile.TemporaryDirectory() as folder:
        Trainer.train_step = stopping
        try:
            finetune("bfloat16", Path(folder) / "run")
        except KeyboardInterrupt:
            pass
        finally:
            Trainer.train_step = train_step
        resumed = finetune("bfloat16", Path(folder) / "run", resume=True).model.params
    yield "parameters that differ in a resumed run", _differing(whole, jax.device_get(resumed)), 0.0


def _differing(a: Any, b: Any) -> float:
    import jax

    return float(
        sum(jax.tree.leaves(jax.tree.map(lambda x, y: np.sum(np.asarray(x) != np.asarray(y)), a, b)))
    )


def float16_training() -> Iterator[Found]:
    """Losses of a float16 run with loss scaling beside those of a float32 run."""
    right, found = ([entry["loss"] for entry in finetune(d).history] for d in ("float32", "float16"))
    yield "losses of a float16 run", error(found, np.array(right)), LIMITS["float16"]


if __name__ == "__main__":
    print(json.dumps(generate_greedily()))
