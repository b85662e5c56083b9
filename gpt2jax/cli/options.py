"""Options that several commands have: models, texts, evaluation, generation, processes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gpt2jax.evaluation.config import EvaluationConfig
from gpt2jax.generation.config import GenerationConfig
from gpt2jax.utils.notices import notice
from gpt2jax.utils.validation import check_path, positive_int, validated

if TYPE_CHECKING:
    from gpt2jax.data.sources import Texts
    from gpt2jax.language_model import LanguageModel

MAX_STAGES = 20  # runs that are followed back
COMPARED_TOKENS = 100  # of each text that a comparison generates


@dataclasses.dataclass(frozen=True)
class TokenizerOptions:
    """How texts become tokens, where the files of the model do not say it.

    Attributes:
        tokenizer: for weights without a tokenizer, or instead of theirs: a folder, a file, or gpt2.
        end_token: the token that begins, separates and ends texts: its text, or its id as a number. Default: that of
            the tokenizer, else of config.json, else of generation_config.json.
    """

    tokenizer: str | None = None
    end_token: str | None = None

    def named_end_token(self) -> str | int | None:
        """Return the end token as `load` takes it."""
        end = self.end_token
        return int(end) if end is not None and end.isascii() and end.isdecimal() else end

    def check(self, *names: str) -> None:
        """Raise an error for a model that is not there, before anything long begins."""
        from gpt2jax.loading import check_model_name

        for name in names:
            check_model_name(name)

    def load(self, name: str) -> LanguageModel:
        """Load a model."""
        from gpt2jax.loading import load

        return load(name, tokenizer=self.tokenizer, end_token=self.named_end_token())


@dataclasses.dataclass(frozen=True)
class TextOptions(TokenizerOptions):
    """How texts become tokens.

    Attributes:
        special_tokens: "parse" reads the special tokens that texts and prompts spell, such as <|endoftext|>, as these
            tokens; "text" reads them as plain characters.
    """

    special_tokens: Literal["text", "parse"] = "text"

    def load(self, name: str) -> LanguageModel:
        """Load a model."""
        from gpt2jax.loading import load

        end, mode = self.named_end_token(), self.special_tokens
        return load(name, tokenizer=self.tokenizer, end_token=end, special_tokens=mode)


@validated
@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Where texts come from.

    Attributes:
        data: "numeric-docs" (documentation of the installed numpy, jax, flax, optax), "python-docs" (of the standard
            library), "pubmed", "arxiv", a file or folder (txt, md, jsonl, json, csv, tsv, parquet, arrow, also
            compressed, or what datasets saved), a quoted pattern ("data/*.txt"), a hub data set (owner/name), or an
            hf:// path.
        more_data: another file, folder or pattern, read behind --data; may be repeated.
        text_column: the column with the text, if there are several; outer.inner for a field of a column of objects.
        documents: what a text is in plain .txt files: "file" (all of it, cut at <|endoftext|>), "paragraph", "line".
        limit: use only the first so many documents.
        streaming: read a hub data set as it comes instead of downloading it first; so does --limit.
        data_revision: commit, tag or branch of a hub data set. The results name the commit, which reads the same again.
        encoding: of the texts in files, such as cp1252. Default: UTF-8.
        records_field: the field of a JSON object that holds the rows, if it holds more than them.
    """

    data: str = "numeric-docs"
    more_data: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    text_column: str | None = None
    documents: Literal["file", "paragraph", "line"] = "file"
    limit: Annotated[int | None, positive_int] = None
    streaming: bool = False
    data_revision: str | None = None
    encoding: str | None = None
    records_field: str | None = None

    @property
    def source(self) -> str | tuple[str, ...]:
        """What `gpt2jax.data.sources.Texts` takes."""
        return (self.data, *self.more_data) if self.more_data else self.data

    def pinned(self) -> DataOptions:
        """Return the same with the commit of a hub data set: all splits are of it, and the results can name it."""
        from gpt2jax.data.sources import pin_revision

        return dataclasses.replace(self, data_revision=pin_revision(self.source, self.data_revision))

    def origin(self, split: str) -> dict[str, Any]:
        """Return where the texts of a split come from, for results."""
        return {"source": self.source, "split": split, "revision": self.data_revision}

    def held_out_split(self) -> str:
        """Return the split to evaluate if none is asked for: a held-out one that the data has by name, else all."""
        texts = self.iterate("all")
        return next((name for name in ("test", "validation") if texts.has_split(name)), "all")

    def describe(self, split: str, count: int) -> tuple[str, dict[str, Any]]:
        """Say which and how many documents of the data a split is, in words and for results."""
        total = self.iterate(split).count_undivided()
        of = "" if total is None else f" of {total:,}"
        first = "the first " if count == self.limit else ""
        part = "all" if split == "all" and not first else f"split {split}"
        origin = self.origin(split) | ({} if total is None else {"total_documents": total})
        return f"{first}{count:,}{of} documents of {self.data}, {part}", origin

    def texts(self, split: str, *, limit: int | None = None) -> list[str]:
        """Return the texts of a split such as train, test[:50%] or all, at most `limit` of them."""
        return list(self.iterate(split, limit=limit))

    def iterate(
        self,
        split: str,
        *,
        limit: int | None = None,
        prompt_column: str | None = None,
        completion_column: str | None = None,
    ) -> Texts:
        """Return the same as a stream, or prompts with completions; see `gpt2jax.data.sources.Texts`."""
        from gpt2jax.data.sources import Texts

        return Texts(
            self.source,
            split,
            text_column=self.text_column,
            prompt_column=prompt_column,
            completion_column=completion_column,
            limit=limit,
            documents=self.documents,
            streaming=self.streaming,
            revision=self.data_revision,
            encoding=self.encoding,
            records_field=self.records_field,
        )


@dataclasses.dataclass(frozen=True)
class EvaluationOptions(EvaluationConfig):
    """`EvaluationConfig` before the dtype, whose default follows from the models, is filled in."""

    __doc__ = EvaluationConfig.__doc__
    compute_dtype: Literal["float32", "tensorfloat32", "bfloat16", "float16"] | None = None  # pyright: ignore

    def __post_init__(self) -> None:
        """Check nothing; `evaluation_config` does."""


@dataclasses.dataclass(frozen=True)
class GenerationOptions(GenerationConfig):
    """`GenerationConfig` with the types that a command line can give."""

    __doc__ = GenerationConfig.__doc__
    bad_words: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    logits_processor: tyro.conf.Suppress[None] = None
    draft_model: tyro.conf.Suppress[None] = None  # `generate` takes its name


@dataclasses.dataclass(frozen=True)
class ComparedTextOptions(GenerationOptions):
    """The same for a comparison: of each prompt one text, of 100 new tokens if no length is given."""

    __doc__ = GenerationConfig.__doc__
    num_return_sequences: tyro.conf.Suppress[int] = 1

    def config(self) -> GenerationConfig:
        """Return the settings with the length filled in."""
        if self.max_new_tokens is None and self.max_length is None:
            return dataclasses.replace(self, max_new_tokens=COMPARED_TOKENS)
        return self


def run_description(model: str) -> dict[str, Any]:
    """Return what `run.json` says if a model is a run, or in one; else nothing."""
    from gpt2jax.utils.json_files import read_json

    folder = check_path("model", model)
    files = (place / "run.json" for place in (folder, folder.parent, folder.parent.parent))
    kinds = {"data": dict, "finetune": dict, "base_model": (str, type(None))}
    return next((read_json(file, optional=kinds) for file in files if file.is_file()), {})


def count_stages(model: str) -> int:
    """Return how many runs, one after the other, made a model; 0 if it is not a run."""
    stages = 0
    # a run that was overwritten by one that began with it would never end
    while (description := run_description(model)) and stages < MAX_STAGES:
        stages += 1
        model = description.get("base_model") or ""
        if not model:
            break
    return stages


def evaluation_config(config: EvaluationOptions, models: Sequence[str]) -> EvaluationConfig:
    """Return the settings of an evaluation; the default dtype is the one that the runs among the models trained in."""
    found = {run_description(model).get("finetune", {}).get("compute_dtype") for model in models} - {None}
    dtype = config.compute_dtype or (found.pop() if len(found) == 1 else "float32")
    return EvaluationConfig(**{**vars(config), "compute_dtype": dtype})


def warn_if_trained_on(model: str, source: DataOptions, split: str) -> None:
    """Give a notice if a model is a run that was trained on texts that are now to be evaluated."""
    trained = run_description(model).get("data", {})
    trained_source = trained.get("source")
    same = tuple(trained_source) if isinstance(trained_source, list) else trained_source
    if same == source.source and split in ("all", trained.get("split")):
        notice(
            f"{model} was trained on split {trained.get('split')} of {source.data}, which is among these texts; "
            "--eval-split test leaves it out"
        )


DOCUMENTATION_PROMPTS = (
    "jax.numpy.mean(a, axis=None)\n\n",
    "numpy.linalg.solve(a, b)\n\nSolve",
    "Returns the",
    "Parameters\n----------\n",
    "This function",
    "",
)


def default_prompts(data: str) -> tuple[str, ...]:
    """Return prompts of the kind of text that the data holds."""
    from gpt2jax.comparison.compare import DEFAULT_PROMPTS

    return DOCUMENTATION_PROMPTS if data in ("numeric-docs", "python-docs") else DEFAULT_PROMPTS


def _is_one_of_several_processes() -> bool:
    """Return whether srun or mpirun started this process with others, and say so."""

    def number(variable: str) -> int:
        value = os.environ.get(variable, "")
        return int(value) if value.isascii() and value.isdecimal() else 1

    mpi, slurm = number("OMPI_COMM_WORLD_SIZE"), number("SLURM_NTASKS")
    # an allocation has SLURM_NTASKS, too; only a step of srun has a list of its nodes
    is_step = slurm > 1 and "SLURM_STEP_NODELIST" in os.environ
    if is_step or mpi > 1:
        program, count = ("srun", slurm) if is_step else ("mpirun", mpi)
        notice(
            f"{program} started {count} processes, which train together; --processes 1 lets each train alone"
        )
        return True
    if slurm > 1:
        notice(f"SLURM_NTASKS is {slurm}, but this process trains alone; srun starts all of them")
    return False


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """Several processes that train together; start each with the same options, except --process.

    Attributes:
        coordinator: host:port on the machine of process 0, or "auto" if Slurm, Open MPI, Kubernetes or a TPU pod
            says which processes take part. Default: "auto" for processes that srun or mpirun started.
        processes: number of processes; 1 trains alone, whatever started it.
        process: the number of this process, from 0.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def initialize(self) -> None:
        """Connect the processes; call this before jax looks for its devices.

        Raises:
            ValueError: the three options do not go together, or "auto" finds no description of the processes.
        """
        if self.coordinator is None and self.processes in (None, 1) and self.process is None:
            if self.processes == 1 or not _is_one_of_several_processes():
                return
            coordinator = "auto"
        else:
            coordinator = self.coordinator
        import jax

        if coordinator == "auto":
            try:
                jax.distributed.initialize(num_processes=self.processes, process_id=self.process)
            except ValueError as error:
                raise ValueError(
                    f"--coordinator auto found no description of the processes ({error})"
                ) from None
            return
        if self.coordinator is None or self.processes is None or self.process is None:
            raise ValueError("several processes need --coordinator HOST:PORT, --processes and --process")
        if not 0 <= self.process < self.processes:
            legal = f"from 0 to {self.processes - 1}"
            raise ValueError(f"--process must be {legal}, got {self.process}")
        if not self.coordinator.rpartition(":")[2].isdecimal():
            raise ValueError(f"--coordinator must be HOST:PORT or auto, got {self.coordinator!r}")
        jax.distributed.initialize(self.coordinator, self.processes, self.process)
