from __future__ import annotations

from gpt2jax.utils.home_folder import abbreviate_home


def test_abbreviate_home_that_is_a_link(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    found = {"model": f"{tmp_path}/link/m", "texts": [f"{tmp_path}/real/a b"], "steps": 3, "name": None}
    assert abbreviate_home(found) == {"model": "~/m", "texts": ["~/a b"], "steps": 3, "name": None}
    assert abbreviate_home(f"x --data={tmp_path}/real/a '{tmp_path}/link'") == "x --data=~/a '~'"
    assert abbreviate_home(f"{tmp_path}/realm {tmp_path}") == f"{tmp_path}/realm {tmp_path}"
