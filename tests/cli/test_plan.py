"""`gpt2jax plan`: what it prints, and one line for a mistake."""

from __future__ import annotations

import jax
import pytest
from jax.errors import JaxRuntimeError

from gpt2jax.cli.plan import main
from gpt2jax.ops.device import Device
from gpt2jax.plan import devices, program


@pytest.mark.slow
def test_plan_prints_the_estimate(capsys):
    main(["--model", "gpt2", "--batch-size", "8", "--device", "a100", "--devices", "1", "--no-compile"])
    text = capsys.readouterr().out
    for part in (
        "gpt2  on 1 x NVIDIA A100 80 GB, 8 x 1,024 tokens a step",
        "residuals",
        "estimate  a lower bound",
        "cuDNN attention",
        "trained parameters  124,439,808",
        "largest batch that fits  at most ",
    ):
        assert part in text
    assert "compiled  " not in text


@pytest.mark.slow
def test_plan_takes_the_options_of_adapters_and_their_devices(capsys):
    main(
        ["--model", "gpt2-mini", "--device", "v5e", "--devices", "2", "--lora.rank", "4", "--batch-size", "2"]
    )
    text = capsys.readouterr().out
    # 4 layers, of which each linear has rank * (inputs + outputs)
    trained = 4 * 4 * ((256 + 768) + (256 + 256) + (256 + 1024) + (1024 + 256))
    assert f"trained parameters  {trained:,}" in text
    assert "not compiled  XLA has no description of 2 x v5e here; described: 1, 4, 8" in text


@pytest.mark.slow
def test_plan_compiles_for_the_device_and_says_whether_it_fits(capsys, monkeypatch):
    monkeypatch.setattr(devices, "topology_devices", lambda device, count: jax.devices()[:count])
    options = [
        "--model",
        "gpt2-mini",
        "--batch-size",
        "1",
        "--sequence-length",
        "16",
        "--compute-dtype",
        "float32",
    ]
    real = program.compile_program

    def compile_here(plan, mesh):
        return real(program.make_program(plan.model, plan.train, Device.of_backend("cpu")), mesh)

    monkeypatch.setattr(program, "compile_program", compile_here)
    main(options)
    shown = capsys.readouterr().out
    assert "compiled  0." in shown and "of arguments" in shown and "fits" in shown

    def refuse(plan, mesh):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM")

    monkeypatch.setattr(program, "compile_program", refuse)
    main(options)
    assert "does not fit  Ran out of memory on HBM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "h20"], "there is no device 'h20'; did you mean 'h200'?"),
        (
            ["--devices", "3", "--fsdp", "2"],
            "devices must be a multiple of fsdp=2 times tensor_parallel=1, got 3",
        ),
        (["--devices", "0"], "devices must be a positive whole number, got 0"),
        (
            ["--batch-size", "9", "--devices", "2"],
            "--batch-size must be a multiple of 2 on these devices, got 9",
        ),
        (
            ["--sequence-length", "2000"],
            "--sequence-length must be at most the model's context of 1024, got 2000",
        ),
        (["--utilisation", "0"], "utilisation must be a number above 0 and at most 1, got 0.0"),
    ],
)
def test_plan_mistake_is_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(options)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1
