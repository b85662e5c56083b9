"""Installs the package from a clone, as the README says, and imports it in the folder that holds the clone.

That folder holds a folder named gpt2jax, the clone, which Python and type checkers can take for a package without
`__init__.py`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "gpt2jax")
# names what the package needs beside its modules: assets, templates, the mark of a typed package
PROBE = """
import importlib.metadata, pathlib
import gpt2jax
package = pathlib.Path(gpt2jax.__file__).parent
for name in ("assets/gpt2-mini/model.safetensors", "assets/vocab.bpe", "assets/report.css",
             "report/templates/report.html.j2", "report/templates/report.md.j2", "py.typed"):
    assert (package / name).is_file(), name
assert importlib.metadata.version("gpt2jax") == gpt2jax.__version__
print(gpt2jax.GPT2Config().n_layer, package)
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files of a clone, in a folder called gpt2jax."""
    clone = tmp_path_factory.mktemp("parent") / "gpt2jax"
    clone.mkdir()
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name)
    return clone


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment with the packages of this one, except gpt2jax where that is a path file."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=True)
    own = next(environment.glob("lib/python*/site-packages"))
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (own / "others.pth").write_text("\n".join(others))
    return environment


def run(environment: Path, *arguments: str, cwd: Path) -> str:
    command = [str(environment / "bin" / "python"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("editable", [True, False], ids=["editable", "wheel"])
def test_installed_package_imports_beside_its_clone(clone, environment, editable):
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--force-reinstall", "--quiet"]
    run(environment, "-m", "pip", "install", *options, *["-e"] * editable, str(clone), cwd=clone.parent)
    places = {cwd: run(environment, "-c", PROBE, cwd=cwd) for cwd in (clone.parent, clone.parent.parent)}
    site = next(environment.glob("lib/python*/site-packages"))
    for found in places.values():
        assert found.split() == ["12", str((clone if editable else site) / "gpt2jax")]
    # pyright and mypy follow plain lines of path files, but no import hooks
    lines = {line for file in site.glob("*gpt2jax*.pth") for line in file.read_text().splitlines()}
    assert lines == ({str(clone)} if editable else set())
    assert not list(clone.glob("*.egg-info")) and not (clone / "build").exists()
