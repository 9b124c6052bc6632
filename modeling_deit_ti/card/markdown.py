"""Formats values for a card, so that names chosen by users cannot break its Markdown, tables, HTML or formulas."""

import re


def clean(value: object) -> str:
    """One line of printable text: a label may contain line breaks, control characters or lone surrogates."""
    joiners = "\u200c\u200d"  # not printable to Python, but emoji and some scripts need them
    line = "".join(character if character.isprintable() or character in joiners else " " for character in str(value))
    return " ".join(line.split())


def text(value: object) -> str:
    """Text that is shown exactly as written in Markdown, tables, HTML and formulas."""
    line = clean(value) or "(blank)"
    # Entities rather than backslashes: they are safe in all four. So is an underscore inside a word.
    return re.sub(r"[\\`*<>\[\]|~&${}!#]|(?<![^\W_])_|_(?![^\W_])", lambda found: f"&#{ord(found.group())};", line)


def code(value: object) -> str:
    """A value as inline code where possible: a backtick would end the code span, and a bar the table cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    line = clean(f"{value:g}" if isinstance(value, float) else value)
    return f"`{line}`" if line and not re.search(r"[`|]", line) else text(line)


def percent(value: float) -> str:
    """A fraction from 0 to 1 as a percentage."""
    return f"{100 * value:.2f} %"


def duration(seconds: float) -> str:
    """A duration in hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
