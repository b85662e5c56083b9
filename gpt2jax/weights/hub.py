"""Models on the Hugging Face hub: their necessary files, fetched once into the hub's own cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# the first of these files that a repository has is fetched, with the shards that go with an index
WEIGHT_FILES = {
    "model.safetensors": (),
    "model.safetensors.index.json": ("model-*-of-*.safetensors",),
    "pytorch_model.bin": (),
    "pytorch_model.bin.index.json": ("pytorch_model-*-of-*.bin",),
    "model.weights.h5": (),
    "tf_model.h5": (),
    "flax_model.msgpack": (),
}
OTHER_FILES = (
    "config.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "assets/tokenizer/vocabulary.json",
    "assets/tokenizer/merges.txt",
)


def download(hub_id: str, *, revision: str | None = None) -> Path:
    """Fetch the necessary files of a model unless they are in the cache; return their folder.

    With HF_HUB_OFFLINE=1, or if the hub cannot be reached, only the cache is used.

    Args:
        hub_id: `owner/name`.
        revision: commit, tag or branch; default: the head of the main branch.

    Raises:
        ValueError: there is no such model, revision or weights file on the hub.
        PermissionError: the model is gated and access was not granted.
        ConnectionError: the hub cannot be reached and the cache does not have the model.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    at = f"{hub_id} at revision {revision}" if revision else hub_id
    gated = f"{at} is gated; ask for access on its page on the hub, then log in with `hf auth login`"
    try:
        if constants.HF_HUB_OFFLINE:
            raise errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        info = HfApi().model_info(hub_id, revision=revision)
    except errors.HFValidationError as error:
        raise ValueError(f"{hub_id!r} is not a name on the hub: {error}") from None
    except errors.GatedRepoError:
        raise PermissionError(gated) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{hub_id} has no revision {revision!r}; give a commit, tag or branch") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"there is no model {hub_id} on the hub, or it is private; check the name, or `hf auth login`"
        ) from None
    except (
        Exception
    ) as error:  # the hub's client changes its HTTP library, and so its errors, between versions
        return _find_cached(
            hub_id, revision, f"{at} is not in the cache and the hub does not answer ({error})"
        )
    files = needed_files([sibling.rfilename for sibling in info.siblings or []], at)
    try:
        # by its name, not by the commit, so that the cache knows the name when offline
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=files))
    except errors.GatedRepoError:
        raise PermissionError(gated) from None
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(f"{at} could not be fetched: {error}") from None


def _find_cached(hub_id: str, revision: str | None, complaint: str) -> Path:
    """Return the folder in the cache, if it has all necessary files of the model."""
    from huggingface_hub import errors, snapshot_download

    for main, shards in WEIGHT_FILES.items():
        files = [main, *shards, *OTHER_FILES]
        try:
            folder = snapshot_download(hub_id, revision=revision, allow_patterns=files, local_files_only=True)
        except errors.LocalEntryNotFoundError:
            continue
        if (Path(folder) / main).is_file():
            return Path(folder)
    raise ConnectionError(f"{complaint}; go online once, or give the path of a folder with its files")


def needed_files(names: Sequence[str], at: str) -> list[str]:
    """Choose the files of a repository that make its model, with weights in the preferred format only.

    Returns:
        Names, and patterns of names.

    Raises:
        ValueError: none of its weights can be read.
    """
    main = next((name for name in WEIGHT_FILES if name in names), None)
    if main is None:
        raise ValueError(f"{at} has no weights that can be read; expected {' or '.join(WEIGHT_FILES)}")
    return [main, *WEIGHT_FILES[main], *(name for name in OTHER_FILES if name in names)]
