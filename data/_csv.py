"""CSV files as users save them, and which of their columns are labels.

A label column holds 0 and 1 (also false and true) in every cell that is not blank; at least one cell must hold one.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import pandas as pd

_VALUES = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}
_SHOWN = 40  # characters of a cell in a message


def read_csv(path: str | Path) -> pd.DataFrame:
    """The table in a UTF-8 CSV file.

    Raises ValueError in one line, with the file's name, where it is empty, of another encoding or no CSV.
    """
    path = Path(path)
    try:
        return pd.read_csv(path, encoding="utf-8", low_memory=False)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} {_where_not_utf8(path)}; save it as UTF-8") from error
    except pd.errors.EmptyDataError as error:
        raise ValueError(
            f"{path.name} is empty; give a CSV with a line of column names and one line per molecule"
        ) from error
    except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:  # ParserError is a ValueError
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ValueError(
            f"{path.name} cannot be read as CSV ({reason}); correct that line or save the file again"
        ) from error


def _where_not_utf8(path: Path) -> str:
    data = path.read_bytes()
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x})"
    return "is not UTF-8 inside"  # an archive, whose text pandas has unpacked


def label_values(column: pd.Series) -> pd.Series | str:
    """The column as 0.0 and 1.0, NaN where a cell is blank; or in words why it is no label column."""
    if pd.api.types.is_numeric_dtype(column):
        blank = column.isna()
        values = column.astype(float).where(column.isin((0, 1)))
    else:
        text = column.map(lambda cell: "" if pd.isna(cell) else str(cell).strip().lower())
        blank = text == ""
        values = text.map(_VALUES)
    if blank.all():
        return "every cell is blank"
    other = values.isna() & ~blank
    if not other.any():
        return values
    example = column[other].iloc[0]
    if isinstance(example, str):
        return f"text, such as {example[:_SHOWN]!r}"
    return f"numbers other than 0 and 1, such as {example}"
