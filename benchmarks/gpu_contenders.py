"""The cases that benchmarks/gpu.py times, and how each library runs them: gpt2jax, plain JAX, torch.

A maker takes a `Case` and returns a function that takes a number and runs the case so often, then waits for the device.
All libraries have random weights of the same shape: how fast they are does not depend on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from gpt2jax.model.config import PRESETS, GPT2Config

Run = Callable[[int], None]

TOP_K = 5
RANK = 8
TINY = GPT2Config(
    vocab_size=512, n_positions=128, n_embd=64, n_layer=2, n_head=1
)  # head dim 64, as all sizes have


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        kind: "train", "lora", "evaluate" or "decode".
        model: a preset's name, or "tiny".
        rows, length: B and T; for decoding T is that of the prompt.
        dtype: of the operands of matrix products.
        dropout: all three rates of the model.
        new_tokens: of a row, for decoding.
        compiled: torch takes part a second time, by torch.compile.
    """

    kind: str
    model: str
    rows: int
    length: int
    dtype: str = "bfloat16"
    dropout: float = 0.0
    new_tokens: int = 0
    compiled: bool = False

    @property
    def name(self) -> str:
        """What the table calls it."""
        shape = (
            f"{self.rows} + {self.new_tokens} new"
            if self.kind == "decode"
            else f"{self.rows} x {self.length}"
        )
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{self.kind} {self.model} {shape} {self.dtype}{dropout}"

    @property
    def tokens(self) -> int:
        """Tokens that one run trains on, scores or makes."""
        return self.rows * (self.new_tokens or self.length)

    @property
    def contenders(self) -> tuple[str, ...]:
        """Names in `MAKERS` of those that can run it."""
        names = ["gpt2jax", "torch"]
        if self.kind != "lora" and not self.dropout:
            names.insert(1, "plain JAX")
        return (*names, "torch.compile") if self.compiled else tuple(names)

    @property
    def config(self) -> GPT2Config:
        """The model's configuration."""
        rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), self.dropout)
        return dataclasses.replace(TINY if self.model == "tiny" else PRESETS[self.model], **rates)

    def ids(self) -> np.ndarray:
        """Token ids [B, T + 1]."""
        shape = (self.rows, self.length + 1)
        return np.random.default_rng(0).integers(0, self.config.vocab_size, shape, dtype=np.int32)


# in the order of what matters most: where time runs out, the last ones are left out
CASES = (
    Case("train", "gpt2", 16, 1024, compiled=True),
    Case("decode", "gpt2", 1, 32, new_tokens=128),
    Case("train", "gpt2", 32, 128, "float16", compiled=True),
    Case("decode", "gpt2", 32, 32, new_tokens=128),
    Case("evaluate", "gpt2", 32, 128),
    Case("lora", "gpt2", 16, 1024),
    Case("train", "gpt2", 16, 1024, dropout=0.1),
    Case("train", "gpt2-medium", 16, 1024),
    Case("decode", "gpt2-medium", 1, 32, new_tokens=128),
    Case("evaluate", "gpt2-medium", 32, 128),
    Case("train", "gpt2-medium", 32, 128),
    Case("decode", "gpt2-medium", 32, 32, new_tokens=128),
    Case("lora", "gpt2-medium", 32, 128),
)
SMOKE = (
    Case("train", "tiny", 2, 32, "float32"),
    Case("decode", "tiny", 2, 8, "float32", new_tokens=8),
)


# ---- gpt2jax ----


def make_gpt2jax(case: Case) -> Run:
    from gpt2jax.language_model import from_config

    make = {"train": _gpt2jax_step, "lora": _gpt2jax_step, "evaluate": _scorer, "decode": _generator}[
        case.kind
    ]
    return make(case, from_config(case.config))


def _gpt2jax_step(case: Case, model: Any) -> Run:
    """The step of a run of `gpt2jax.finetune`, on the state that such a run begins with."""
    import jax

    from gpt2jax.lora.config import LoRAConfig
    from gpt2jax.train.config import FinetuneConfig
    from gpt2jax.train.optimizer import make_optimizer
    from gpt2jax.train.state import starting_state
    from gpt2jax.train.step import make_configured_step

    config = FinetuneConfig(
        steps=1000,
        learning_rate=1e-5,
        schedule="constant",
        batch_size=case.rows,
        compute_dtype=case.dtype,  # type: ignore[arg-type]
        lora=LoRAConfig(RANK, 16.0, targets=("attn.c_attn",)) if case.kind == "lora" else None,
    )
    optimizer = make_optimizer(config, 1000)
    state, frozen, mask, _ = starting_state(
        model, config, optimizer, length=case.length, mesh=None, checkpoints=None
    )
    step = make_configured_step(case.config, config, optimizer, precision(case.dtype), mask=mask)
    ids, ones = case.ids(), np.ones((case.rows, case.length), np.float32)
    batch = jax.device_put({"tokens": ids[:, :-1], "targets": ids[:, 1:], "loss_mask": ones})

    def run(times: int) -> None:
        nonlocal state
        for _ in range(times):
            state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))

    return run


def precision(dtype: str, **overrides: Any) -> Any:
    """gpt2jax's dtypes and choices for this device."""
    from gpt2jax.ops.precision import Precision

    return Precision.for_device(dtype, **overrides)


def _scorer(case: Case, model: Any) -> Run:
    from gpt2jax.evaluation.scoring import Scorer

    scorer, ids = Scorer(model, case.dtype), case.ids()
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}

    def run(times: int) -> None:
        for scores in [scorer(batch) for _ in range(times)]:
            for score in scores:
                np.asarray(score)

    return run


def _generator(case: Case, model: Any) -> Run:
    from gpt2jax.generation.generator import Generator

    generator, prompts = Generator(model, dtype=case.dtype), case.ids()[:, 1:].tolist()
    # an id that is not drawn from random weights' top 5 cannot be known: no stop token at all
    settings = {"max_new_tokens": case.new_tokens, "top_k": TOP_K, "stop_token_ids": ()}

    def run(times: int) -> None:
        for _ in range(times):
            made = generator.generate(prompts, **settings)
        assert all(len(row.token_ids) == case.new_tokens for row in made)

    return run


# ---- plain JAX ----


def make_plain(case: Case) -> Run:
    import gpu_plain
    import jax
    import jax.numpy as jnp

    params, heads = jax.jit(gpu_plain.init, static_argnums=0)(case.config), case.config.n_head
    dtype = jnp.dtype(case.dtype)
    is_cudnn = precision(case.dtype).execution.attention == "cudnn"
    kernel, ids = "cudnn" if is_cudnn else "xla", jnp.asarray(case.ids())
    tokens, targets = ids[:, :-1], ids[:, 1:]
    moments = gpu_plain.optimizer().init(params) if case.kind == "train" else None
    if case.kind == "decode":
        params = jax.tree.map(lambda x: x.astype(dtype), params)

    def run(times: int) -> None:
        nonlocal params, moments
        results = []
        for _ in range(times):
            if case.kind == "train":
                params, moments, loss = gpu_plain.train_step(
                    params, moments, tokens, targets, heads, dtype, kernel
                )
                results = [loss]
            elif case.kind == "evaluate":
                results.append(gpu_plain.evaluate(params, tokens, targets, heads, dtype, kernel))
            else:
                np.asarray(gpu_plain.generate(params, tokens, case.new_tokens, heads, TOP_K))
        jax.block_until_ready(results)

    return run


# ---- torch ----


def make_torch(case: Case, compiled: bool = False) -> Run:
    import torch
    from transformers import GPT2Config as HFConfig
    from transformers import GPT2LMHeadModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("highest")
    settings = HFConfig(**case.config.to_hf(), attn_implementation="sdpa")
    model = GPT2LMHeadModel(settings).to(device)
    dtype, ids = getattr(torch, case.dtype), torch.tensor(case.ids(), dtype=torch.long, device=device)
    if case.kind == "decode":
        return _torch_generate(case, model.to(dtype).eval(), ids[:, 1:])
    if case.kind == "lora":
        import peft

        lora = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
        model = peft.get_peft_model(model, lora)
    forward = torch.compile(model) if compiled else model
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].flatten()
    autocast = torch.autocast(device, dtype, enabled=case.dtype != "float32")

    def loss() -> Any:
        with autocast:
            logits = forward(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits.float(), targets), logits

    if case.kind == "evaluate":
        return _torch_evaluate(model, loss, targets)
    return _torch_train(case, model, loss)


def _torch_train(case: Case, model: Any, loss: Any) -> Run:
    import torch

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    is_cuda = trained[0].is_cuda
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=is_cuda)
    scaler = torch.amp.GradScaler(trained[0].device.type, enabled=case.dtype == "float16")

    def run(times: int) -> None:
        for _ in range(times):
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss()[0]).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            scaler.step(optimizer)
            scaler.update()
        if is_cuda:
            torch.cuda.synchronize()

    return run


def _torch_evaluate(model: Any, loss: Any, targets: Any) -> Run:
    import torch

    model.eval()

    @torch.inference_mode()
    def run(times: int) -> None:
        for _ in range(times):
            value, logits = loss()
            value.item()
            (logits.argmax(-1) == targets).sum().item()

    return run


def _torch_generate(case: Case, model: Any, prompts: Any) -> Run:
    import torch

    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": case.new_tokens, "do_sample": True, "top_k": TOP_K, "pad_token_id": 0}

    @torch.inference_mode()
    def run(times: int) -> None:
        for _ in range(times):
            made = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
            assert made.shape[1] == prompts.shape[1] + case.new_tokens
            made.tolist()

    return run


MAKERS: dict[str, Callable[[Case], Run]] = {
    "gpt2jax": make_gpt2jax,
    "plain JAX": make_plain,
    "torch": make_torch,
    "torch.compile": lambda case: make_torch(case, compiled=True),
}


def peak_bytes(name: str) -> int:
    """The most memory of the device that this process has held; on a CPU the most of the machine's."""
    from contenders import resident

    if name.startswith("torch"):
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident()
    import jax

    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use") or resident()
