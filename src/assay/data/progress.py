"""Progress bars that appear only where somebody can see them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str, progress: bool) -> Iterator[Item]:
    """Yield `items`, with a bar on a terminal if `progress` is true."""
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    if not (progress and console.is_terminal):
        yield from items
        return
    yield from rich_track(items, description, console=console, transient=True)


@contextmanager
def byte_bar(description: str, total: int | None, progress: bool) -> Iterator:
    """Give a function that is told how many bytes have arrived, shown as a bar on a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    if not (progress and console.is_terminal):
        yield lambda count: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.update(task, completed=count)
