"""Generation on several devices: rows are shared, and are those of one device."""

from __future__ import annotations

import pytest
from devices import on_four_devices

PROGRAM = """
import json

import jax

from gpt2jax.generation import generator
from gpt2jax.language_model import LanguageModel
from gpt2jax.model.config import GPT2Config
from gpt2jax.model.gpt2 import init_params

config = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=300, n_positions=64)
model = LanguageModel(config, jax.tree.map(lambda x: x * 6, init_params(config, 0)), None)
ragged = [[1] * 5, [2, 3], [4] * 20, [5], [6, 7, 8], [9] * 7]
shared = [[7] * 18 + [i] for i in range(6)]
share, found = generator.row_mesh, []
for prompts in (ragged, shared):
    for mesh in (share, lambda: None):
        generator.row_mesh = mesh
        # rows end at different steps, and the cache grows on the way
        stops = list(range(0, 300, 40))
        found.append(
            [
                (out.token_ids, out.logprobs)
                for out in generator.Generator(model).generate(
                    prompts, seed=3, max_new_tokens=30, stop_token_ids=stops, batch_size=8
                )
            ]
        )
print(json.dumps({"devices": share().size, "found": found}))
"""


@pytest.mark.slow
@pytest.mark.thorough
def test_rows_on_four_devices_are_those_of_one():
    result = on_four_devices(PROGRAM)
    assert result["devices"] == 4
    ragged, ragged_alone, shared, shared_alone = result["found"]
    for several, one in ((ragged, ragged_alone), (shared, shared_alone)):
        assert [row[0] for row in several] == [row[0] for row in one]
        for (_, got), (_, want) in zip(several, one, strict=True):
            assert got == pytest.approx(want, abs=1e-5)
        assert len({len(row[0]) for row in one}) > 1
