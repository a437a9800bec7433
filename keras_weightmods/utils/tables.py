"""Reports that print as tables of rich."""


class PrintsAsTable:
    """Gives a class with `__rich_console__` the same table as its `str`."""

    def __str__(self):
        from rich.console import Console

        console = Console(width=100)
        with console.capture() as capture:
            console.print(self)
        return capture.get()
