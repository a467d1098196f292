"""What a run says on the terminal: tables and a live line for people, plain lines for files and pipes.

Model output is hostile: it is printed as text, never as markup, and its control characters are made visible.
"""

import contextlib
import io
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

LINE = (  # metric, its name on the line, its format
    ("sft/loss", "loss", "{:.3f}"),
    ("dpo/loss", "loss", "{:.3f}"),
    ("dpo/accuracy", "accuracy", "{:.0%}"),
    ("dpo/margin", "margin", "{:.3f}"),
    ("reward/total", "reward", "{:.3f}"),
    ("solve_rate", "solved", "{:.0%}"),
    ("eval/pass@1", "pass@1", "{:.1%}"),
    ("length/mean", "length", "{:.1f}"),
    ("kl", "kl", "{:.2g}"),
    ("grad_norm", "grad", "{:.2g}"),
    ("seconds/step", "s/step", "{:.2f}"),
)
TABLE = (
    ("pass@1", "{:.1%}"),
    ("lenient", "{:.1%}"),
    ("greedy", "{:.1%}"),
    ("majority", "{:.1%}"),
    ("format", "{:.1%}"),
    ("mean_length", "{:.1f}"),
)
PIPE_WIDTH = 120


class Terminal:
    """Prints a run to `out`, warnings to `err`; in a pipe a line every `every` steps instead of a live one.

    A `quiet` one prints nothing: of several processes the first one speaks.
    """

    def __init__(
        self, out: IO[str] | None = None, err: IO[str] | None = None, every: int = 10, quiet: bool = False
    ) -> None:
        if quiet:
            out = err = io.StringIO()
        out = sys.stdout if out is None else out
        assert out is not None
        # Notebooks get plain lines: they read as well there, and rich's live line needs a widget package. Their kernels
        # set FORCE_COLOR, which rich takes for a terminal: the stream alone decides.
        self._out = Console(file=out, highlight=False, force_jupyter=False, force_terminal=out.isatty())
        if not self._out.is_terminal:
            self._out.width = PIPE_WIDTH  # tables for a file do not depend on the window
        self._err = err or sys.stderr
        self._every = every
        self._progress: Progress | None = None

    @property
    def live(self) -> bool:
        """Whether somebody is looking at a terminal."""
        return self._out.is_terminal

    def say(self, text: str) -> None:
        """A line of its own."""
        self._out.print(self._text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line on stderr; above the live line where both go to the same terminal."""
        if self.live and self._err.isatty():
            self._out.print(self._text(f"warning: {text}", "yellow"), soft_wrap=True)
        else:
            print(f"warning: {visible(text)}", file=self._err, flush=True)

    def announce(self, prompts: int, group: int, steps: int, device: str = "") -> None:
        """The arithmetic of a run, before anything is compiled."""
        where = f" on {device}" if device else ""
        self.say(f"{prompts} prompts x {group} = {prompts * group} completions a step, {steps} steps{where}")

    def parameter_table(self, rows: Iterable[tuple[str, tuple[int, ...], str, str]]) -> None:
        """Name, shape and dtype of each parameter, with the number of values and their total.

        The fourth text of a row says which axes of the mesh it is split over; '' where it is copied.
        """
        table = Table(box=SIMPLE_HEAD, show_footer=True)
        rows = list(rows)
        sizes, split = [math.prod(shape) for _, shape, *_ in rows], any(axes for *_, axes in rows)
        table.add_column("parameter", footer="total", overflow="fold")
        table.add_column("shape")
        table.add_column("dtype")
        table.add_column("values", justify="right", footer=f"{sum(sizes):,}")
        if split:
            table.add_column("split over")
        for (name, shape, dtype, axes), size in zip(rows, sizes, strict=True):
            more = [axes or "copied"] if split else []
            table.add_row(Text(name), "x".join(map(str, shape)) or "scalar", dtype, f"{size:,}", *more)
        self._out.print(table)

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table of texts, its first column to the left."""
        self.end_steps()
        made = Table(box=SIMPLE_HEAD)
        for number, heading in enumerate(headings):
            made.add_column(heading, justify="right" if number else "left", overflow="fold")
        for row in rows:
            made.add_row(*(self._text(cell) for cell in row))
        self._out.print(made)

    @contextlib.contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """Says that `what` is being compiled while the block runs, and afterwards how long that took."""
        start = time.monotonic()
        if self.live and self._progress is None:
            with self._out.status(Text(f"compiling {what} ...")):
                yield
        else:
            self.say(f"compiling {what} ...")
            yield
        self.say(f"compiled {what} in {time.monotonic() - start:.1f} s")

    def step(self, step: int, steps: int, metrics: Mapping[str, Any]) -> None:
        """Shows a step: the live line moves, or a plain line is printed every `every` steps and at the last."""
        if self.live:
            self._live_step(step, steps, metrics)
        elif step % self._every == 0 or step in (1, steps) or "eval/pass@1" in metrics:
            self.say(f"step {step}/{steps}  {_line(metrics)}")

    def before_after_table(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Held-out scores before and after; pass@1 with its 95% interval, rows that both lack are left out."""
        self.end_steps()
        table = Table(box=SIMPLE_HEAD, title="held-out problems", title_justify="left")
        for heading in ("", "before", "after"):
            table.add_column(heading, justify="right" if heading else "left")
        for name, form in TABLE:
            cells = [_cell(scores, name, form) for scores in (before, after)]
            if any(cells):
                table.add_row(name.replace("_", " "), *(cell or "-" for cell in cells))
        self._out.print(table)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Completions with prompt and reward, right ones in green."""
        self.end_steps()
        for row in rows:
            head = self._text(f"step {row['step']}  " if "step" in row else "", "dim")
            if (total := row.get("total")) is not None:
                head = Text.assemble(head, self._text(f"reward {total:.2f}  ", "green" if total > 0 else "red"))
            if row.get("answer") is not None:
                head = Text.assemble(head, self._text(f"answer {row['answer']}", "dim"))
            self._out.print(head, soft_wrap=True)
            for name in ("prompt", "completion"):
                body = str(row[name]).replace("\n", "\n" + " " * 14)
                self._out.print(Text.assemble(self._text(f"  {name:12}", "dim"), self._text(body)), soft_wrap=True)

    def end_steps(self) -> None:
        """Takes the live line down and leaves its last state."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_steps()

    def _text(self, text: str, style: str = "") -> Text:
        encoding = self._out.encoding  # an ASCII pipe must not end a run of hours
        return Text(visible(text).encode(encoding, "backslashreplace").decode(encoding), style=style)

    def _live_step(self, step: int, steps: int, metrics: Mapping[str, Any]) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=16),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=False)),
                console=self._out,
                redirect_stderr=False,
            )
            # Steps of an earlier process are no work of this one: the time that is left comes from what is seen here.
            self._progress.add_task("", total=steps, completed=step - 1, line="")
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=step, line=_line(metrics))


def visible(text: str) -> str:
    """Text whose control characters (terminal commands among them) are shown as escapes; newlines and tabs stay."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _line(metrics: Mapping[str, Any]) -> str:
    shown = [f"{label} {form.format(value)}" for key, label, form in LINE if (value := metrics.get(key)) is not None]
    return "  ".join(shown)


def _cell(scores: Mapping[str, Any], name: str, form: str) -> str:
    if scores.get(name) is None:
        return ""
    interval = scores.get(f"{name}_ci95")
    low_high = f" [{form.format(interval[0])}, {form.format(interval[1])}]" if interval else ""
    return form.format(scores[name]) + low_high
