"""Where the command prints tables."""

import shutil

from rich.console import Console


def table_console() -> Console:
    """Standard output, wide enough that no name in a table is cut; a narrow terminal wraps the lines itself."""
    return Console(highlight=False, width=max(shutil.get_terminal_size().columns, 240))
