"""Aligned tables for people, JSON for programs, and files that are never half written."""
import json
import math
import os
from pathlib import Path
from typing import NamedTuple


class Table(NamedTuple):
    """What is shown as text, as markdown and on a page."""
    caption: str
    header: list[str]
    rows: list[list[str]]

    def as_text(self) -> str:
        return f"{self.caption}:\n{format_table(self.rows, self.header)}"


def format_table(rows: list[list[str]], header: list[str] | None = None) -> str:
    """Columns of text, two spaces apart; with a header, a line below it."""
    shown = [header, *rows] if header else rows
    widths = [max(len(row[i]) for row in shown) for i in range(len(shown[0]))] if shown else []
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in shown]
    if header:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def format_markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def format_json(value, indent: int | None = 1) -> str:
    """Strict JSON: nan and infinities become null, a Table an object. Without an indent on one line, without spaces."""
    def clean(value):
        value = value._asdict() if isinstance(value, Table) else value
        if isinstance(value, dict):
            return {str(key): clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value
    return json.dumps(clean(value), indent=indent, separators=(",", ":") if indent is None else None)


def write_text(path: Path, text: str) -> None:
    """Under a temporary name first, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
