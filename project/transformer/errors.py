"""The one exception that stands for something the user can mend, and text made fit to be shown."""

import unicodedata

# They turn the direction of all text that follows.
TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class UserError(Exception):
    """Bad input. Its text is one clear sentence; the program prints it and exits with 1."""


class Diverged(UserError):
    """The loss, or the gradient, is not a finite number; the weights are as they were before.

    Args:
        what: of the two.
        value: its value.
        step: number of the step, from 1.

    """

    def __init__(self, what: str, value: float, step: int) -> None:
        super().__init__(what, value, step)  # so that it can be sent from process to process
        self.step = step

    def __str__(self) -> str:
        what, value, step = self.args
        return f"{what} is {value} at step {step}: try a smaller --lr"


def shown(text: str) -> str:
    """A text without characters that a terminal would obey: they are replaced by signs for them.

    Tabs and line breaks stay; a carriage return before a line break is left out.
    """
    return "".join(map(_sign, text.replace("\r\n", "\n")))


def _sign(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or character.isprintable():
        return character
    if code < 32:
        return chr(0x2400 + code)  # Unicode has pictures of these, such as the one of escape
    if code == 127:
        return "\u2421"
    if character in TURNS or unicodedata.category(character) in ("Cc", "Cs"):
        return ascii(character)[1:-1]
    return character  # not printable, but harmless: rare spaces, marks, letters not yet known
