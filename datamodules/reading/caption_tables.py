"""Tables of captions: text files with a header, and a row for each caption, in fields that a separator parts.

Fields may be quoted, as :mod:`csv` has it, and then hold the separator, line ends and doubled quotes. The separator is
a tab, comma, semicolon or bar, whichever gives the columns, and spaces around fields do not count.
"""

import codecs
import csv
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from datamodules.reading import listing
from datamodules.reading.caption_rows import Rows

SEPARATORS = ("\t", ",", ";", "|")
IMAGE_COLUMNS = (
    *("filepath", "file_path", "filename", "file_name", "image", "image_path", "image_file", "image_name"),
    *("path", "file", "img", "img_path"),
)
CAPTION_COLUMNS = ("title", "caption", "captions", "text", "comment", "description", "sentence", "raw")
BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def check_encoding(encoding: str) -> None:
    """Raises ValueError for the name of an encoding that Python does not know."""
    try:
        "".encode(encoding)
    except (LookupError, ValueError):  # also of codecs that are not of texts
        raise ValueError(
            f"unknown encoding {encoding!r}: expected utf-8, cp1252, gb18030 or another that Python knows"
        ) from None


def lines(path: Path, encoding: str) -> Iterator[str]:
    """The lines of a text file, ends included, in the encoding that its byte order mark says, or else in ``encoding``.

    Raises:
        ValueError: If a byte does not belong to the encoding; the message has the line.
    """
    with path.open("rb") as file:
        start = file.read(3)
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if start.startswith(mark)), encoding)
    try:
        with path.open(encoding=encoding, newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {_undecodable(path, encoding)}: byte {error.object[error.start]:#04x} is not {encoding}: "
            "set encoding to that of the file, such as cp1252 or gb18030"
        ) from None
    except UnicodeError as error:  # of UTF-16 without a mark
        raise ValueError(f"{path} is not {encoding}: {error}") from None


def _undecodable(path: Path, encoding: str) -> int:
    """Number of the first line that is not in an encoding: files are decoded many lines at a time."""
    decoder = codecs.getincrementaldecoder(encoding)()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                decoder.decode(line)
            except UnicodeDecodeError:
                return number
    return number  # it ends within a character


def read(path: Path, image_column: str | None, caption_column: str | None, encoding: str) -> Rows:
    """Reads a table; :func:`datamodules.reading.captions.read` says what its arguments are.

    Raises:
        ValueError: If it is empty, lacks a column, or has quotes that are never closed.
    """
    rest = lines(path, encoding)
    header_line, header = next(((number, line) for number, line in enumerate(rest, 1) if line.strip()), (0, ""))
    if not header:
        raise ValueError(f"{path} is empty: expected a line that names the columns, and a row for each caption")
    separator, columns, image, caption = _columns(path, header, image_column, caption_column)
    rows = Rows(path, [path.parent], where="line {}")
    records = csv.reader(rest, delimiter=separator, strict=True, skipinitialspace=True)
    while True:
        line = header_line + records.line_num + 1
        try:
            record = next(records)
        except StopIteration:
            return rows
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {line}: {error}: expected fields in double quotes to end with one, and quotes within "
                "them to be doubled"
            ) from None
        if not any(field.strip() for field in record):
            continue
        if len(record) == len(columns):
            rows.add(record[image].strip(), record[caption], line)
        else:
            fields = f"{len(record)} fields where the header has {len(columns)}"
            rows.fault(f"{fields} (one that holds the separator has to be quoted)", f"line {line}")


def _columns(
    path: Path, header: str, image_column: str | None, caption_column: str | None
) -> tuple[str, list[str], int, int]:
    """The separator, the names of the columns, and which of them have the image and the caption."""
    parted = {separator: _fields(header, separator) for separator in SEPARATORS}
    wanted = ((image_column, IMAGE_COLUMNS), (caption_column, CAPTION_COLUMNS))
    complete = (each for each in SEPARATORS if all(_matching(parted[each], *names) for names in wanted))
    separator = next(complete, max(SEPARATORS, key=lambda each: len(parted[each])))
    columns = parted[separator]
    image, caption = chosen(path, columns, image_column, caption_column)
    return separator, columns, columns.index(image), columns.index(caption)


def chosen(path: Path, columns: Sequence[str], image_column: str | None, caption_column: str | None) -> tuple[str, str]:
    """The columns that have the image and the caption.

    Raises:
        ValueError: If there is none, or more than one that may be meant; the message says which there are.
    """
    found = []
    for option, name, usual in (
        ("image_column", image_column, IMAGE_COLUMNS),
        ("caption_column", caption_column, CAPTION_COLUMNS),
    ):
        matching = _matching(columns, name, usual)
        if not matching:
            raise ValueError(f"{path} has no column {_lacking(columns, option, name, usual)}")
        if len(matching) > 1:
            raise ValueError(f"{path} has the columns {' and '.join(matching)}: set {option} to the one that is meant")
        found += matching
    return found[0], found[1]


def _fields(header: str, separator: str) -> list[str]:
    try:
        (fields,) = csv.reader([header], delimiter=separator, skipinitialspace=True)
    except (ValueError, csv.Error):
        return []
    return [field.strip() for field in fields]


def _matching(columns: Sequence[str], name: str | None, usual: Sequence[str]) -> list[str]:
    """The columns that are called by a name, or in one of the usual ways."""
    return [column for column in columns if (column.lower() in usual if name is None else column == name)]


def _lacking(columns: Sequence[str], option: str, name: str | None, usual: Sequence[str]) -> str:
    """A missing column, those that there are, and the one that may be meant, for a message."""
    there = f"it has {listing.some([f'{column:.40}' for column in columns])}"
    if name is not None:
        like = get_close_matches(name, columns, 1)
        return f"{name!r} ({option}): {there}" + (f". Did you mean {like[0]}?" if like else "")
    like = [column for column in columns if get_close_matches(column.lower(), usual, 1)][:1]
    meant = f" such as {like[0]}" if like else ""
    return f"{', '.join(usual[:-1])} or {usual[-1]}: {there}: set {option} to one of them{meant}"
