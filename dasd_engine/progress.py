"""The bar of a command that works through rows, on stderr; it leaves nothing behind."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


def progress_bar(what: str, told: str = "", *, quiet: bool, counted: bool = True) -> Progress:
    """`told`: a field of its task that is shown too. `counted`: rows, of which so many are done."""
    columns: list[ProgressColumn] = [TextColumn(what), BarColumn()]
    if counted:
        columns.append(MofNCompleteColumn())
    if told:
        columns.append(TextColumn(f"{{task.fields[{told}]}}"))
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=quiet, transient=True)
