from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec
import huggingface_hub
import pytest
from sample_files import TEXTS, json_lines, parquet, write

from gpt2jax.data import hub as hub_module
from gpt2jax.data.docs_corpus import SPLITS
from gpt2jax.data.sources import Texts, load_texts, pin_revision

pytestmark = pytest.mark.usefixtures("empty_folder")

COMMIT, OTHER = "c" * 40, "0" * 40


class Hub:
    """The hub's client: files at one commit, of which what is fetched lies in a folder; `asked` says what was."""

    def __init__(self, folder: Path):
        self.folder, self.online, self.asked = folder / "snapshots" / COMMIT, True, []
        self.folder.mkdir(parents=True)
        for split in SPLITS:
            for name, prefix in (("pubmed", ""), ("arxiv", "partial-")):
                path = self.folder / name / f"{prefix}{split}" / "0000.parquet"
                path.parent.mkdir(parents=True)
                parquet(path, article=[f"{name} {split} {i} .\nend ." for i in range(3)], abstract=["a"] * 3)

    def snapshot_download(
        self, hub_id, *, repo_type, revision, allow_patterns, local_files_only=False
    ) -> str:
        assert repo_type == "dataset"
        self.asked.append((hub_id, revision, allow_patterns[0]))
        if not self.online and not local_files_only:
            raise ConnectionError("Couldn't reach\nthe hub")
        return str(self.folder if revision != OTHER else self.folder.with_name(OTHER))

    def local(self, path: str) -> Path:
        """The place of a file that `hf://datasets/owner/name@commit/...` names."""
        if not self.online:
            raise ConnectionError("Couldn't reach\nthe hub")
        return self.folder.parent / path.partition("@")[2]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    made = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)

    class HubFiles(fsspec.AbstractFileSystem):
        """The file system of hf:// paths."""

        protocol, cachable = "hf", False

        def info(self, path, **_):
            place = made.local(path)
            kind = "directory" if place.is_dir() else "file"
            return {"name": self._strip_protocol(path), "size": place.stat().st_size, "type": kind}

        def ls(self, path, detail=True, **_):
            path = str(self._strip_protocol(path))
            if not made.local(path).is_dir():
                return [self.info(path)] if detail else [path]
            found = [f"{path}/{place.name}" for place in made.local(path).iterdir()]
            return [self.info(name) for name in found] if detail else found

        def _open(self, path, mode="rb", **_):
            made.asked.append(path)
            return open(made.local(path), mode)

    fsspec.register_implementation("hf", HubFiles, clobber=True)
    few = {name: dict.fromkeys(counts, 3) for name, counts in hub_module.PAPERS_TEXTS.items()}
    monkeypatch.setattr(hub_module, "PAPERS_TEXTS", few)
    yield made
    fsspec.register_implementation("hf", huggingface_hub.HfFileSystem, clobber=True)


@pytest.mark.parametrize("name", ["pubmed", "arxiv"])
def test_papers_from_the_hub_are_of_one_commit(hub, name):
    expected = [f"{name} test {i} .\nend ." for i in range(3)]
    commit = pin_revision(name)
    assert commit == COMMIT and hub.asked == [
        ("armanc/scientific_papers", "refs/convert/parquet", ".gitattributes")
    ]
    hub.asked.clear()
    assert load_texts(name, split="test", revision=commit) == expected
    assert hub.asked == [("armanc/scientific_papers", COMMIT, f"{name}/test/*.parquet")]  # no other split
    assert load_texts(name, split="test") == expected
    assert pin_revision(name, "main") == COMMIT and hub.asked[-1][1] == "main"
    assert len(load_texts(name, split="all")) == 9
    assert load_texts(name, split="test", text_column="abstract") == ["a"] * 3


def test_papers_are_streamed_from_the_commit(hub):
    stream = iter(Texts("arxiv", revision=COMMIT, streaming=True))
    assert next(stream) == "arxiv train 0 .\nend ."
    file = f"datasets/armanc/scientific_papers@{COMMIT}/arxiv/partial-train/0000.parquet"
    assert set(hub.asked) == {file}
    assert load_texts("arxiv", revision=COMMIT, limit=2) == [f"arxiv train {i} .\nend ." for i in range(2)]
    assert set(hub.asked) == {file}


@pytest.mark.parametrize("streaming", [False, True])
def test_papers_without_the_hub(hub, monkeypatch, streaming):
    """What was fetched once is read from the cache; what was not is one line that says where to get it."""
    hub.online = False
    assert len(list(load_texts("pubmed", split="test", revision=COMMIT, streaming=streaming))) == 3
    with pytest.raises(
        FileNotFoundError, match=r"Couldn't reach the hub\)\. Get arxiv-dataset\.zip"
    ) as caught:
        load_texts("arxiv", streaming=streaming)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        FileNotFoundError, match=f"no files pubmed/test/.* at commit {OTHER}. Get pubmed-data"
    ):
        load_texts("pubmed", split="test", revision=OTHER)


@pytest.mark.parametrize("streaming", [False, True])
def test_papers_that_are_not_all_there(hub, monkeypatch, streaming):
    monkeypatch.setitem(hub_module.PAPERS_TEXTS["arxiv"], "train", 203_037)
    message = (
        f"copy of arxiv at commit {COMMIT} has 3 texts in its train split instead of 203,037. Get arxiv-"
    )
    with pytest.raises(ValueError, match=message):
        list(load_texts("arxiv", streaming=streaming))
    assert len(load_texts("arxiv", limit=3)) == 3
    assert len(load_texts("arxiv", split="test")) == 3


def test_hub(hub, monkeypatch, papers):
    calls = []

    def load_dataset(path, name=None, **options):
        calls.append((path, name, options))
        return papers

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_texts("owner/name", split="test") == [f"test {i}" for i in range(4)]
    assert load_texts("owner/name:config", revision="abc", limit=2) == ["train 0", "train 1"]
    assert calls == [
        ("owner/name", None, {"revision": COMMIT, "streaming": False}),
        ("owner/name", "config", {"revision": COMMIT, "streaming": True}),
    ]
    names = [("owner/name", None, ".gitattributes"), ("owner/name", "abc", ".gitattributes")]
    assert hub.asked == names


def test_another_commit_in_the_cache_is_not_taken(hub, monkeypatch, papers, tmp_path):
    papers.save_to_disk(str(tmp_path / OTHER))
    cached = datasets.load_from_disk(str(tmp_path / OTHER))["train"]  # its folder bears a commit's name
    monkeypatch.setattr(type(cached), "cache_files", [{"filename": str(tmp_path / OTHER / "a.arrow")}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": cached})
    with pytest.raises(FileNotFoundError, match=f"owner/name at commit {COMMIT} .* the cache has {OTHER}"):
        load_texts("owner/name", revision=COMMIT)
    assert len(load_texts("owner/name", revision=OTHER)) == 2


def test_what_is_here_has_no_revision(tmp_path, hub):
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS))
    for source in ("python-docs", str(path)):
        assert pin_revision(source) is None
        with pytest.raises(ValueError, match="is not on the hub: it has no revision 'main'"):
            load_texts(source, revision="main")
    write(tmp_path / "pubmed-dataset" / "train.txt", json_lines(TEXTS, "article_text"))
    assert pin_revision("pubmed") is None and load_texts("pubmed", "all") == TEXTS
    assert pin_revision("pubmed", COMMIT) == COMMIT and hub.asked == []
    with pytest.raises(ValueError, match="got 'wikipedia'"):
        pin_revision("wikipedia")


def test_hub_data_with_a_single_split(hub, monkeypatch):
    texts = [f"text {i}" for i in range(40)]

    def load_dataset(path, name=None, **options):
        data = datasets.Dataset.from_dict({"line": texts}).to_iterable_dataset()
        return {"train": data.map(lambda row: {"text": row["line"]}, remove_columns=["line"])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    parts = [load_texts("owner/name", split=split) for split in SPLITS]
    assert [len(part) for part in parts] == [36, 2, 2]
    assert sorted(sum(parts, [])) == sorted(texts)


def test_hub_out_of_reach_is_one_line(hub, monkeypatch):
    hub.online = False
    with pytest.raises(
        FileNotFoundError, match=r"there is no file or folder a/b, .*Couldn't reach the hub\)$"
    ) as caught:
        load_texts("a/b")
    assert "\n" not in str(caught.value)


def test_hub_script_names_the_conversion(hub, monkeypatch):
    def load_dataset(path, name=None, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found b.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match="revision='refs/convert/parquet'"):
        load_texts("a/b")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("by_variable", [False, True])
def test_pubmed_from_its_archive(tmp_path, monkeypatch, packed, by_variable):
    place = tmp_path / "elsewhere" if by_variable else tmp_path
    if by_variable:
        monkeypatch.setenv(hub_module.DATA_VARIABLE, str(place))
    for name in ("train", "val", "test"):
        row = {
            "article_id": "x",
            "article_text": [f"{name} .", "2 ."],
            "section_names": ["i"],
            "labels": None,
        }
        content = json.dumps(row) + "\n"
        if packed:
            place.mkdir(exist_ok=True)
            with zipfile.ZipFile(place / "pubmed-dataset.zip", "a") as archive:
                archive.writestr(f"pubmed-dataset/{name}.txt", content)
        else:
            write(place / "pubmed-dataset" / f"{name}.txt", content)
    assert load_texts("pubmed", split="train") == ["train .\n2 ."]
    assert load_texts("pubmed", split="validation") == ["val .\n2 ."]
    assert load_texts("pubmed", split="test") == ["test .\n2 ."]


@pytest.mark.parametrize("revision", ["", "@main", "@refs/convert/parquet"])
def test_hf_paths(hub, revision):
    root = f"hf://datasets/owner/name{revision}"
    expected = [f"pubmed test {i} .\nend ." for i in range(3)]
    assert load_texts(f"{root}/pubmed/test/0000.parquet", "all") == expected
    assert load_texts(f"{root}/pubmed", "test[:2]") == expected[:2]
    assert pin_revision(f"{root}/pubmed") == COMMIT
    assert hub.asked[0] == ("owner/name", revision[1:] or None, ".gitattributes")
    write(hub.folder / "a.jsonl", json_lines(TEXTS))
    assert load_texts(f"{root}/a.jsonl", "all") == TEXTS
    for missing in ("absent", "absent.jsonl"):
        with pytest.raises(FileNotFoundError, match=f"no file or folder {root}/{missing}, and the hub"):
            load_texts(f"{root}/{missing}")


def test_hf_path_of_a_data_set_is_its_id(hub, monkeypatch, papers):
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, revision, streaming: papers)
    assert load_texts("hf://datasets/owner/name", "test[:1]") == ["test 0"]
    assert hub.asked == [("owner/name", None, ".gitattributes")]
