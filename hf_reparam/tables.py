"""What people read: paragraphs and tables, as plain text of at most 100 columns, as Markdown, or as HTML."""

import html
import re
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

Part = str | list[list[str]]
"""A paragraph, lines in it as they are, or a table, the first row its head."""

_WIDTH = 100
_LEAST = 20  # columns of text in a table


class Readable:
    """What says itself in parts: as plain text, as Markdown, and as tables in notebooks.

    In plain text long lines go on in the next, below what follows their title; long cells below their beginning.

    >>> class Ranks(Readable):
    ...     def parts(self) -> list[Part]:
    ...         return ["ranks:", [["name", "rank"], ["fc", "8"]]]
    >>> print(Ranks())
    ranks:
    <BLANKLINE>
    name  rank
    ----------
    fc    8
    """

    def parts(self) -> list[Part]:
        """What is printed."""
        raise NotImplementedError

    def to_markdown(self) -> str:
        """Markdown tables, and paragraphs."""
        return as_markdown(self.parts())

    def __str__(self) -> str:
        return "\n\n".join(_paragraph(part) if isinstance(part, str) else _text_table(part) for part in self.parts())

    def _repr_html_(self) -> str:
        return "\n".join(_html_paragraph(part) if isinstance(part, str) else _html_table(part) for part in self.parts())


def as_markdown(parts: Sequence[Part]) -> str:
    """Markdown: every line is a paragraph."""
    return "\n\n".join(part.replace("\n", "\n\n") if isinstance(part, str) else _markdown_table(part) for part in parts)


def _paragraph(text: str) -> str:
    def fill(line: str) -> str:
        title = re.match(r"[^:]+: {2,}|", line)
        indent = " " * len(title[0]) if title else ""
        return textwrap.fill(line, _WIDTH, subsequent_indent=indent, break_long_words=False)

    return "\n".join(map(fill, text.splitlines()))


def _text_table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gaps = 2 * (len(widths) - 1)
    while sum(widths) + gaps > _WIDTH and max(widths) > _LEAST:
        widths[widths.index(max(widths))] -= 1
    lines: list[str] = []
    for row in rows:
        columns = [_pieces(cell, width) for cell, width in zip(row, widths, strict=True)]
        for cells in zip_longest(*columns, fillvalue=""):
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _pieces(text: str, width: int) -> list[str]:
    """A cell in lines of at most this width, parted after spaces and dots; those after the first are indented."""
    lines = [""]
    for word in re.findall(r"[^ .]*[ .]*", text):
        if lines[-1].strip() and len((lines[-1] + word).rstrip()) > width:
            lines.append("  ")
        lines[-1] += word
    return [line.rstrip() for line in lines]


def _markdown_table(rows: list[list[str]]) -> str:
    head, *body = ("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)
    return "\n".join([head, "| " + " | ".join(["---"] * len(rows[0])) + " |", *body])


def _html_paragraph(text: str) -> str:
    return f"<p>{html.escape(text).replace(chr(10), '<br>')}</p>"


def _html_table(rows: list[list[str]]) -> str:
    def row_of(row: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    head, *body = rows
    return f"<table>\n{row_of(head, 'th')}\n" + "".join(f"{row_of(row, 'td')}\n" for row in body) + "</table>"
