"""Text files of users: UTF-8, with or without a byte-order mark, read whole."""

from __future__ import annotations

import codecs
import io
from pathlib import Path

# UTF-32's little-endian mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: str | Path) -> str:
    """The text of a file, without a byte-order mark, every line break as one "\\n".

    Args:
        path: the file.

    Raises:
        ValueError: it is in another encoding, or has NUL characters. The message names the file.
        OSError: it cannot be read.

    """
    content = Path(path).read_bytes()
    for mark, name in MARKS.items():
        if content.startswith(mark):
            raise ValueError(
                f"{path} is not UTF-8 text but {name}: convert it, for example with "
                f"iconv -f {name} -t UTF-8"
            )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if "\0" in text:
        raise ValueError(
            f"{path} is not UTF-8 text: it has NUL characters (the first is character "
            f"{text.index(chr(0))}), as UTF-16 and files that are no text have"
        )
    return io.StringIO(text, newline=None).read()
