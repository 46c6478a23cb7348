"""What ``data-tools check`` found, as rows and as a table for people."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class CheckRow:
    """One fact."""

    dataset: str
    subject: str
    """Empty for facts of the whole dataset."""
    fact: str
    state: Literal["ok", "differs", "not compared"]
    found: int | str
    declared: int | None = None
    """The published number, where there is one."""

    @property
    def place(self) -> str:
        return f"{self.dataset}/{self.subject}" if self.subject else self.dataset

    def explain(self) -> str:
        """Return one line that names the fact."""
        stated = f", published: {self.declared}" if self.declared is not None else ""
        return f"{self.place}: {self.fact}: {self.found}{stated}"


@dataclass(frozen=True)
class CheckReport:
    """All facts in the order in which they were checked."""

    rows: tuple[CheckRow, ...]
    ok: bool = field(init=False)
    first_difference: str | None = field(init=False)
    """The first row that differs, in words."""

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if row.state == "differs"]
        object.__setattr__(self, "ok", not wrong)
        object.__setattr__(self, "first_difference", wrong[0].explain() if wrong else None)


def describe_check(report: CheckReport) -> str:
    """Return the table, and below it the first difference if there is one."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("place", "fact", "found", "published", "state"):
        table.add_column(name, overflow="fold")
    for row in report.rows:
        declared = "" if row.declared is None else f"{row.declared}"
        table.add_row(row.place, row.fact, f"{row.found}", declared, row.state)
    text = io.StringIO()
    Console(file=text, width=120, markup=False, highlight=False).print(table)
    if report.first_difference is None:
        return text.getvalue() + "all facts agree"
    return text.getvalue() + f"first difference: {report.first_difference}"
