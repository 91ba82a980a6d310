"""Headings for scripts' output. Only that they exist matters (MyPT specification 1.10)."""

from mypt_fast import console

ROBOT_HEAD = r"""
   .-------.
   | o   o |
   |   ^   |
   | '---' |
   '-------'
"""


def get_banner_string(title: str = "MyPT", subtitle: str | None = None, width: int = 60) -> str:
    """Return a framed title of at least `width` columns, the subtitle under it."""
    lines = [str(title), *([str(subtitle)] if subtitle else [])]
    inner = max(width - 4, *map(len, lines))
    edge = "+" + "-" * (inner + 2) + "+"
    return "\n".join([edge, *(f"| {line:^{inner}} |" for line in lines), edge])


def print_banner(title: str = "MyPT", subtitle: str | None = None, width: int = 60) -> None:
    """Print a framed title."""
    console.say(get_banner_string(title, subtitle, width))


def print_section(title: str, char: str = "-", width: int = 60) -> None:
    """Print a title between two rules."""
    rule = (char or "-") * width
    console.say(f"\n{rule[:width]}\n{title}\n{rule[:width]}")


def banner_train() -> None:
    """Print the heading of a training script."""
    print_banner("MyPT", "training")


def banner_generate() -> None:
    """Print the heading of a generating script."""
    print_banner("MyPT", "text generation")


def banner_webapp() -> None:
    """Print the heading of a web application."""
    print_banner("MyPT", "web application")


def banner_workspace() -> None:
    """Print the heading of a workspace tool."""
    print_banner("MyPT", "workspace")


def banner_dataset() -> None:
    """Print the heading of a dataset script."""
    print_banner("MyPT", "dataset preparation")
