"""Tables of Parquet, Arrow and Feather files, read batch by batch by pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from gpt2jax.data.columns import BATCH_ROWS, Columns, Item, cell_of, column_kinds, to_item
from gpt2jax.data.files import TABLES, File
from gpt2jax.utils.limits import check_in_memory, check_stream

KINDS: dict[str, str] = dict(zip(TABLES, ("Parquet", "Arrow", "Feather"), strict=True))
# a column that unpacks to more than this is decoded few rows at a time
_DENSE_RATIO, _DENSE_ROWS = 100, 8


def arrow_items(file: File, columns: Columns) -> Iterator[Item]:
    """Yield the texts or pairs of a table; only their columns are read.

    Raises:
        ValueError: the file is of another kind or damaged, or the column to read is not clear.
    """
    import pyarrow

    size, row = 0, 0
    packed_size = file.packed_size
    with file.open_seekable() as stream:
        try:
            schema, batches = _open(stream, file)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{file.name} is not a whole {KINDS[file.suffixes[0]]} file: {_line(error)}"
            ) from None
        try:
            kinds = column_kinds(schema, columns.wanted)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file.name} is damaged: the name of a column is not UTF-8: {error}") from None
        names = columns.choose(kinds, file.name)
        roots = [name if name in schema.names else name.split(".")[0] for name in names]
        twice = next((root for root in roots if schema.names.count(root) > 1), None)
        if twice is not None:
            raise ValueError(f"{file.name} has two columns {twice!r}; rename one of them")
        try:
            for cells in batches(roots):
                row += 1
                item = to_item([cell_of(cells, name) for name in names], names, f"{file.name}, row {row}")
                size += len(item) if isinstance(item, str) else sum(map(len, item.values()))
                check_stream(file.name, size, packed_size)
                yield item
        except (pyarrow.ArrowException, OSError, MemoryError) as error:  # such as the size of a part
            raise ValueError(f"{file.name} is damaged: {_line(error)}") from None


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _open(stream: IO[bytes], file: File) -> tuple[Any, Any]:
    """Return the schema of a table, and a function from names of columns to its rows as dicts."""
    import pyarrow
    import pyarrow.feather
    import pyarrow.ipc
    import pyarrow.parquet

    if file.suffixes[0] == ".parquet":
        table = pyarrow.parquet.ParquetFile(stream)
        for group in range(table.num_row_groups):  # half of it: of a large one not all is in memory at a time
            check_in_memory(
                file.name, table.metadata.row_group(group).total_byte_size // 2, file.packed_size or 0
            )
        return table.schema_arrow, lambda names: _rows(
            table.iter_batches(_batch_rows(table, names), columns=list(dict.fromkeys(names))), names
        )
    start = stream.read(4)
    stream.seek(0)
    if start == b"FEA1":  # the first version of Feather
        whole = pyarrow.feather.read_table(stream)
        return whole.schema, lambda names: _rows(whole.to_batches(BATCH_ROWS), names)
    if start == b"ARRO":
        parts = pyarrow.ipc.open_file(stream)
        batches = (parts.get_batch(number) for number in range(parts.num_record_batches))
        return parts.schema, lambda names: _rows(batches, names)
    reader = pyarrow.ipc.open_stream(stream)  # as `datasets` writes
    return reader.schema, lambda names: _rows(reader, names)


def _batch_rows(table: Any, names: list[str]) -> int:
    """Return how many rows to decode at once: few if a short dictionary holds the texts of many rows."""
    metadata, paths = table.metadata, [column.path for column in table.schema]
    read = [i for i, path in enumerate(paths) if any(f"{path}.".startswith(f"{name}.") for name in names)]
    for group in range(metadata.num_row_groups):
        # what is damaged is an error here; `column` would end the process
        next(table.iter_batches(1, row_groups=[group], columns=list(dict.fromkeys(names))), None)
        parts = [metadata.row_group(group).column(number) for number in read]
        if any(part.total_uncompressed_size > _DENSE_RATIO * part.total_compressed_size for part in parts):
            return _DENSE_ROWS
    return BATCH_ROWS


def _rows(batches: Any, names: list[str]) -> Iterator[dict[str, Any]]:
    names = list(dict.fromkeys(names))
    for batch in batches:
        batch.select(names).validate(full=True)  # reading damaged offsets may end the process
        for start in range(0, batch.num_rows, _DENSE_ROWS):  # few: a dictionary's cells become texts here
            part = batch.slice(start, _DENSE_ROWS)
            columns = {name: part.column(name).to_pylist() for name in names}
            for cells in zip(*columns.values(), strict=True):
                yield dict(zip(columns, cells, strict=True))
