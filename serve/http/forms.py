"""multipart/form-data, as browsers and OpenAI's client send files: the parts of a body, read strictly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.http.http_errors import HttpError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

T = TypeVar("T")

_MOST_PARTS = 256  # a stack named by brackets has two for each adapter
_MOST_TEXT = 2**18  # bytes of a part that is no file; a prompt has at most 32,000 characters


@dataclass
class Part:
    """A part: its name, that of its file, None where it is text, and what it holds, or the file that has that."""

    name: str = ""
    filename: str | None = None
    content: bytes = b""
    path: Path | None = None

    def text(self) -> str:
        """Return a text field's value; 400 when it is a file, or no UTF-8."""
        if self.filename is not None:
            raise refused_part(self, "is text, and was sent as a file; send it as text")
        if len(self.content) > _MOST_TEXT:
            raise refused_part(self, f"is longer than {_MOST_TEXT} bytes; shorten it")
        try:
            return self.content.decode()
        except UnicodeDecodeError:
            raise refused_part(self, "is not UTF-8; send the text in that encoding") from None


def refused_part(part: Part, why: str, code: str = "invalid_value") -> HttpError:
    """Return the 400 for a part that is wrong by itself."""
    name = part.name[:80]
    return HttpError(400, f"{name}: {why}", code, param=name)


def boundary_of(content_type: str) -> bytes:
    """Return the boundary between parts; 415 when the content type is not multipart/form-data with one."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise HttpError(
            415,
            "send the image as a form, with Content-Type: multipart/form-data and its boundary, as curl -F does",
            "not_multipart",
        )
    return boundary


def read_parts(body: bytes, boundary: bytes) -> Sequence[Part]:
    """Return the parts of a form in their order; 400 when it is damaged or cut off."""
    form = FormReader(boundary)
    form.write(body)
    return form.finish()


class FormReader:
    """A form that is read as it arrives; 400 when it is damaged.

    folder: where files are written, each under a number, so that they take no memory; none: they are kept in it.
    """

    def __init__(self, boundary: bytes, folder: Path | None = None) -> None:
        self._gathered = _Gathered(folder)
        self._parser = self._explained(MultipartParser, boundary, self._gathered.callbacks())

    def write(self, chunk: bytes) -> None:
        """Read on."""
        self._explained(self._parser.write, chunk)

    def finish(self) -> Sequence[Part]:
        """Return the parts in their order; 400 when the form is cut off."""
        self._explained(self._parser.finalize)
        if not self._gathered.is_whole:
            raise HttpError(400, "the form is cut off before its end; send it again", "invalid_form")
        return self._gathered.parts

    @staticmethod
    def _explained(act: Callable[..., T], *given: Any) -> T:
        try:
            return act(*given)
        except FormParserError as error:
            raise HttpError(400, f"the body is not a form with this boundary: {error}", "invalid_form") from None


@dataclass
class _Gathered:
    """Gathers parts from what the parser finds."""

    folder: Path | None
    parts: list[Part] = field(default_factory=list)
    is_whole: bool = False
    _chunks: list[bytes] = field(default_factory=list)
    _file: BinaryIO | None = None
    _size: int = 0
    _header: bytes = b""
    _value: bytes = b""

    def callbacks(self) -> MultipartCallbacks:
        """Return what the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._add_header,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.parts) >= _MOST_PARTS:
            raise HttpError(400, f"the form has more than {_MOST_PARTS} parts", "invalid_form")
        self.parts.append(Part())
        self._chunks, self._size = [], 0

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            kind, options = parse_options_header(self._value.decode("latin-1"))
            if kind != b"form-data" or b"name" not in options:
                raise HttpError(400, "a part of the form has no name; each is form-data with one", "invalid_form")
            self.parts[-1].name = options[b"name"].decode("utf-8", "replace")
            filename = options.get(b"filename")
            self.parts[-1].filename = None if filename is None else filename.decode("utf-8", "replace")
        self._header = self._value = b""

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        part = self.parts[-1]
        if self.folder is None:
            self._chunks.append(data[start:end])
        elif part.filename is None:
            self._size += end - start
            if self._size > _MOST_TEXT:
                raise refused_part(part, f"is longer than {_MOST_TEXT} bytes; shorten it, or send it as a file")
            self._chunks.append(data[start:end])
        else:
            if self._file is None:
                part.path = self.folder / f"{len(self.parts)}"
                self._file = part.path.open("xb")
            self._file.write(data[start:end])

    def _end_part(self) -> None:
        if not self.parts[-1].name:
            raise HttpError(400, "a part of the form has no name; each is form-data with one", "invalid_form")
        self.parts[-1].content = b"".join(self._chunks)
        if self._file is not None:
            self._file.close()
            self._file = None

    def _end(self) -> None:
        self.is_whole = True
