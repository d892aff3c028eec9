"""Text from configurations and corpora as LaTeX and Markdown: every character printed as itself, none as a command. Pure."""

from __future__ import annotations

import re
import unicodedata

# Commands are those of OT1 and the math fonts, which every LaTeX has; braces keep them apart from what follows.
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\ensuremath{<}",
    ">": r"\ensuremath{>}",
    "|": r"\ensuremath{|}",
    "`": "{`}",
    '"': '{"}',
    "[": "{[}",  # after the end of a row it would open an argument, and `*` change the command
    "*": "{*}",
    "±": r"\ensuremath{\pm}",
    "×": r"\ensuremath{\times}",
    "−": r"\ensuremath{-}",
    "†": r"\ensuremath{\dagger}",
    "‡": r"\ensuremath{\ddagger}",
    "–": r"\textendash{}",
    "—": r"\textemdash{}",
    "ß": r"\ss{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "œ": r"\oe{}",
    "Œ": r"\OE{}",
}
_ACCENTS = {
    "\u0300": r"\`",
    "\u0301": r"\'",
    "\u0302": r"\^",
    "\u0303": r"\~",
    "\u0304": r"\=",
    "\u0306": r"\u",
    "\u0307": r"\.",
    "\u0308": r"\"",
    "\u030a": r"\r",
    "\u030b": r"\H",
    "\u030c": r"\v",
    "\u0323": r"\d",
    "\u0327": r"\c",
}
_LIGATURE = re.compile(r"(?<=-)(?=-)|(?<=')(?=')")  # `--` would print as one dash
_MARKDOWN = frozenset("\\`*_{}[]<>#|~&$!^")


def latex(text: str) -> str:
    """LaTeX source that prints `text` on one line; what its fonts lack is printed as its code point."""
    return _LIGATURE.sub("{}", "".join(map(_latex_character, _one_line(text))))


def markdown(text: str) -> str:
    """Markdown source that prints `text` on one line, inside a table cell too."""
    return "".join(f"\\{character}" if character in _MARKDOWN else character for character in _one_line(text))


def _one_line(text: str) -> str:
    """White space of any kind becomes one space, other control characters and lone surrogates become U+FFFD."""
    joined = " ".join(text.split())
    return "".join("\ufffd" if unicodedata.category(character) in ("Cc", "Cs") else character for character in joined)


def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    if character.isascii():
        return character
    parts = unicodedata.normalize("NFD", character)
    if len(parts) == 2 and parts[0].isascii() and parts[0].isalpha() and parts[1] in _ACCENTS:
        letter = f"\\{parts[0]}" if parts[0] in "ij" and parts[1] not in "\u0323\u0327" else parts[0]
        return f"{_ACCENTS[parts[1]]}{{{letter}}}"
    return f"{{[}}U+{ord(character):04X}]"
