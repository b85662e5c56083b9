"""What Hugging Face's files beside the weights hold besides the architecture: read, kept, and written again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gpt2jax.model.config import GPT2Config
from gpt2jax.utils.json_files import read_json

# what is written anew, and what belongs to other files or versions
_OWN = {field.name for field in dataclasses.fields(GPT2Config)} | {
    *("model_type", "architectures", "n_ctx", "dtype", "torch_dtype", "transformers_version", "auto_map"),
    *("_name_or_path", "quantization_config", "pruned_heads", "add_cross_attention"),
}


@dataclasses.dataclass(frozen=True)
class SavedSettings:
    """The files beside some weights.

    Attributes:
        config: content of config.json.
        generation: content of generation_config.json, {} if there is none.
    """

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_derived(self) -> bool:
        """Whether generation_config.json only repeats config.json, or is not there."""
        return not self.generation or bool(self.generation.get("_from_model_config"))

    @property
    def unused_config(self) -> dict[str, Any]:
        """What config.json holds that `GPT2Config` does not, such as a pad token or the parameters of tasks."""
        return {name: value for name, value in self.config.items() if name not in _OWN}


def read_saved_settings(folder: Path) -> SavedSettings:
    """Return what lies in the folder of some weights.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    paths = (folder / "config.json", folder / "generation_config.json")
    config, generation = (read_json(path) if path.is_file() else {} for path in paths)
    # a preset of Keras has a config.json of another kind
    return SavedSettings({} if "class_name" in config else config, generation)
