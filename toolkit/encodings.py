"""What encoding a text file that is not UTF-8 seems to be saved in. Imports no torch."""

import codecs
import contextlib
import gzip
import re
from collections.abc import Sequence
from pathlib import Path

from config import ConfigError

# How the most frequent characters of a legacy encoding begin: (its name, Python's codec, first bytes, smallest second
# byte). They are the punctuation, the kana and the more frequent half of the ideographs, in the order of each standard.
LEGACY = (
    ("Big5", "cp950", (*range(0xA1, 0xC7),), 0x40),
    ("GBK", "gbk", (*range(0xA1, 0xA4), *range(0xB0, 0xD8)), 0xA1),
    ("Shift-JIS", "cp932", (*range(0x81, 0x84), *range(0x88, 0x98)), 0x40),
    ("EUC-JP", "euc_jp", (0xA1, 0xA4, 0xA5, *range(0xB0, 0xD0)), 0xA1),
    ("EUC-KR", "cp949", (0xA1, *range(0xB0, 0xC9)), 0xA1),
)


def looks_like(sample: bytes) -> str | None:
    """Return the encoding of a text that is not UTF-8, as a guess, or None."""
    if wide := _wide_encoding(sample):
        return wide
    if b"\0" in sample:
        return "binary data, not text"
    high = re.findall(rb"[\x80-\xff]", sample)
    alone = re.findall(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])", sample)
    shares = {name: _frequent_share(sample, codec, leads, least) for name, codec, leads, least in LEGACY}
    # Hangul uses some of the first bytes that Chinese uses: if both fit a longer text, it is Hangul.
    best = max(shares, key=lambda name: (round(shares[name], 2), name == "EUC-KR" and len(high) >= 16))
    # In a Western text accented letters mostly have ASCII letters on both sides, or all bytes are letters of Latin-1.
    if len(alone) > max(0.5, shares[best]) * len(high) or (shares[best] < 0.7 and min(high) >= b"\xc0"):
        return "Latin-1 or cp1252 (Western)"
    return best if shares[best] >= 0.7 else None


def _frequent_share(sample: bytes, codec: str, leads: Sequence[int], least: int) -> float:
    """Return the share of non-ASCII characters that are frequent in a legacy encoding; 0 if the text is not in it."""
    try:
        text = codecs.getincrementaldecoder(codec)().decode(sample)
    except UnicodeDecodeError:
        return 0.0
    pairs = [char.encode(codec) for char in text if ord(char) > 127]
    return sum(len(pair) == 2 and pair[0] in leads and pair[1] >= least for pair in pairs) / max(len(pairs), 1)


def _wide_encoding(sample: bytes) -> str | None:
    """Return UTF-32 or UTF-16 for bytes in it, or None.

    They begin with its byte order mark, or are ASCII, ideographs, kana and Hangul if read as it.
    """
    for name, size in (("UTF-32", 4), ("UTF-16", 2)):  # the mark of UTF-16 is the beginning of that of UTF-32
        for codec in (f"{name.lower()}-le", f"{name.lower()}-be"):
            if sample.startswith("\ufeff".encode(codec)):
                return name
            text = sample[: len(sample) // size * size].decode(codec, "replace") if b"\0" in sample else ""
            usual = re.findall("[\t\n\r -~\u00a0-\u017f\u2010-\u2027\u3000-\u9fff\uac00-\ud7a3\uff01-\uff5e]", text)
            if len(usual) > 0.9 * len(text):
                return name
    return None


def check_config(path: Path) -> None:
    """Raise ConfigError if a config file is not UTF-8, with a guess at what it is. All else is found when it is read."""
    with contextlib.suppress(OSError):
        if path.is_file() and (problem := not_utf8(path)):
            raise ConfigError(f"--config: cannot read {path}: {problem}")


def not_utf8(path: str | Path, whole: bool = True) -> str | None:
    """Return which line of a text file is not UTF-8, what it looks like and what to do; None if all lines are UTF-8.

    whole: False looks only whether the file begins like UTF-16 or UTF-32, which may be valid UTF-8 with zero bytes.
    """
    with gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb") as file:
        done, sample = 0, file.read(2**16)
        if not _wide_encoding(
            sample
        ):  # ASCII text in UTF-16 or UTF-32 without a mark would be valid UTF-8 with zero bytes
            if not whole:
                return None
            file.seek(0)
            while True:
                block = b"".join(file.readlines(2**22))  # whole lines: none of them ends inside a character
                try:
                    block.decode("utf-8")
                except UnicodeDecodeError as error:
                    start = block.rfind(b"\n", 0, error.start) + 1
                    done, sample = done + block.count(b"\n", 0, error.start), block[start : start + 2**16]
                    break
                if not block:
                    return None
                done += block.count(b"\n")
    guess = looks_like(sample)
    return f"line {done + 1} is not UTF-8{f': it looks like {guess}' if guess else ''}; save the file as UTF-8"
