"""Training on several devices, in separate processes: virtual devices of a CPU, and two processes.

The single-device run is the measure: losses within 1e-5, whatever the mesh, and checkpoints that move between them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

PATIENCE = 1200  # seconds until a process counts as hung; on a busy machine one took more than 300
SCRIPT = """
import json, os, signal, sys
import jax
settings = json.loads(sys.argv[1])
if "process" in settings:
    jax.distributed.initialize(settings["coordinator"], 2, settings["process"])
import numpy as np
import gpt2jax
import gpt2jax.train.trainer as trainer
from gpt2jax.train.finetune import finetune

config = gpt2jax.GPT2Config(
    n_layer=2, n_head=4, n_embd=32, vocab_size=96, n_positions=32, bos_token_id=95, eos_token_id=95,
    embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
)
model = gpt2jax.from_config(config, seed=0)
texts = [list(map(int, np.random.default_rng(i).integers(0, 90, 20 + i))) for i in range(24)]
out = []
batch = trainer.Batches.batch

def asked(self, step):
    if step == stop and jax.process_index() == jax.process_count() - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return batch(self, step)

trainer.Batches.batch = asked
for run in settings["runs"]:
    stop = run.pop("stop", None)
    lora = gpt2jax.LoRAConfig(rank=4) if run.pop("lora", False) else None
    fields = {"steps": 4, "batch_size": 16, "sequence_length": 16, "log_every": 1, **run.pop("config", {})}
    finetune_config = gpt2jax.FinetuneConfig(lora=lora, **fields)
    try:
        result = finetune(
            model, texts, finetune_config, validation_texts=texts[:5], progress=False, resume="output" in run, **run
        )
    except KeyboardInterrupt as interrupt:
        out.append(str(interrupt))
        continue
    leaf = jax.tree.leaves(result.model.adapters or result.model.params)[0]
    out.append({
        "losses": [e["loss"] for e in result.history],
        "validation": result.history[-1]["validation_loss"],
        "sum": float(sum(np.abs(np.asarray(x)).sum() for x in jax.tree.leaves(result.model.params))),
        "devices": len(leaf.sharding.device_set),
    })
if jax.process_index() == 0:
    print("RESULT" + json.dumps(out))
"""


def environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_parallel_codegen_split_count=2"
    # how work is cut and gathered is decided long before
    flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # XLA's rendezvous wait for all devices: their threads must not be fewer
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PJRT_NPROC": "16"}


def start(settings: dict, devices: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(settings)],
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str]) -> list[dict]:
    try:
        stdout, stderr = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, stderr[-4000:]
    return json.loads(stdout.rpartition("RESULT")[2])


def same(runs: list[dict], reference: dict) -> None:
    for run in runs:
        assert run["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        assert run["validation"] == pytest.approx(reference["validation"], abs=1e-5)
        assert run["sum"] == pytest.approx(reference["sum"], rel=1e-5)
        assert run["devices"] == 1  # what a run gives back is whole


@pytest.fixture(scope="module")
def single() -> list[dict]:
    return result(start({"runs": [{}, {"lora": True}, {"lora": True, "config": {"base_dtype": "int8"}}]}, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Of a run that begins on eight devices, goes on in two processes, and ends on one device."""
    return str(tmp_path_factory.mktemp("moved") / "run")


@pytest.mark.slow
@pytest.mark.thorough
def test_finetune_on_meshes_of_eight_devices_equals_one_device(single, folder):
    meshes = [{}, {"fsdp": 4, "gradient_accumulation_steps": 2}, {"fsdp": 4, "tensor_parallel": 2}]
    rounded = {"fsdp": 4, "tensor_parallel": 2, "base_dtype": "int8"}
    runs = [{"config": mesh} for mesh in meshes] + [
        {"lora": True, "config": c} for c in ({"fsdp": 2}, rounded)
    ]
    runs.append({"output": folder, "config": meshes[2], "stop": 1})
    *full, lora, lora_of_int8, stopped = result(start({"runs": runs}, 8))
    assert "step 2 is saved" in stopped
    same(full, single[0])
    same([lora], single[1])
    same([lora_of_int8], single[2])


@pytest.mark.slow
@pytest.mark.thorough
def test_finetune_in_two_processes_equals_one_and_resumes_on_one_device(single, folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    # the signal comes to the second process only, in its third step: both end with the same one
    runs = [{"config": {}}, {"output": folder, "config": {"fsdp": 2}, "stop": 2}]
    settings = {"runs": runs, "coordinator": coordinator}
    first, second = (start({**settings, "process": i}, 1) for i in range(2))
    try:
        whole, stopped = result(first)
        same([whole], single[0])
        assert "step 3 is saved" in stopped
        stderr = second.communicate(timeout=PATIENCE)[1]
        assert second.returncode == 0, stderr[-4000:]
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    same(result(start({"runs": [{"output": folder}]}, 1)), single[0])
