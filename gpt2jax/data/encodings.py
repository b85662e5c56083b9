"""Which encoding a text is probably in, for the message that names it. A text is never decoded by a guess."""

from __future__ import annotations

import codecs
import re
import unicodedata

# byte order marks; that of UTF-32 begins with that of UTF-16
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_WESTERN = "[éèêëàâäáåãæçñóòôöõøœùûüúíìîïßÉÄÖÜ“”‘’„–—…«»°§€£©®·\xa0¿¡]"
_EASTERN = "[ąćęłńóśźżĄĆĘŁŃŚŹŻáčďéěíňřšťúůýžÁČĎÉĚŘŠŤÚŮÝŽőűŐŰöüÖÜ“”‘’„–—…\xa0]"
_TURKISH = _WESTERN[:-1] + "ğışĞİŞ]"
_CYRILLIC = "[а-яё]"
_JAPANESE = "[\u3000-\u30ff\u4e00-\u9fff]"
_HAN = "[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
# encoding -> the characters that its texts have beside ASCII; the first of the best wins
_USUAL = {
    "cp1252": _WESTERN,
    "mac-roman": _WESTERN,
    "cp850": _WESTERN,
    "cp1250": _EASTERN,
    "iso8859-2": _EASTERN,
    "cp1254": _TURKISH,
    **dict.fromkeys(("cp1251", "koi8-r", "cp866", "iso8859-5"), _CYRILLIC),
    "cp1253": "[ά-ώ]",
    "cp1255": "[א-ת]",
    "cp1256": "[ء-ي]",
    "shift_jis": _JAPANESE,
    "euc-jp": _JAPANESE,
    "euc-kr": "[\uac00-\ud7a3]",
    "gb18030": _HAN,
    "big5": _HAN,
}
_ACCENTED = ("cp1252", "mac-roman", "cp850", "cp1250", "iso8859-2", "cp1254")
# the letters of most of a text: the bytes of one alphabet are rarer letters of another
_FREQUENT = {
    _CYRILLIC: "[оеаинтсрвл]",
    "[ά-ώ]": "[αοιετσνρκπ]",
    "[א-ת]": "[יוהלארתמבש]",
    "[ء-ي]": "[اليمنورتبه]",
}


def wide_encoding(start: bytes) -> str | None:
    """Return the UTF-16 or UTF-32 that a file is in by its first bytes, without a mark by its zero bytes."""
    for mark, name in _MARKS.items():
        if start.startswith(mark):
            return name
    start = start[: len(start) // 4 * 4] or start[: len(start) // 2 * 2]
    if not start:
        return None
    zeros = [
        start[place::4].count(0) / len(start[place::4]) if start[place::4] else 0.0 for place in range(4)
    ]
    if min(zeros[2:]) > 0.9 or min(zeros[:2]) > 0.9:
        found = "utf-32-le" if zeros[0] < zeros[3] else "utf-32-be"
        return found if _is_readable(start, found) else None
    odd, even = start[1::2].count(0) / len(start[1::2]), start[::2].count(0) / len(start[::2])
    # texts without Latin letters have zeros in line ends and spaces only
    is_foreign = min(odd, even) == 0 and re.search(rb"[\x01-\x08\x80-\xff]", start)
    if max(odd, even) > (0.01 if is_foreign else 0.3) and min(odd, even) < 0.1:
        found = "utf-16-le" if odd > even else "utf-16-be"
        return found if _is_readable(start, found) else None
    return None


def _is_readable(start: bytes, encoding: str) -> bool:
    """Return whether bytes are text in an encoding: no characters that it lacks, or that texts do not have."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(start)  # its end may be inside a character
    except UnicodeDecodeError:
        return False
    odd = {char for char in text if unicodedata.category(char) in ("Cc", "Cn", "Co")}
    return odd <= set("\t\n\v\f\r\x1a\x1b")


def escaped_encoding(line: bytes) -> str | None:
    """Return the ISO 2022 encoding of a line, which is ASCII with escape sequences; None if it has none of them."""
    marks = {rb"\x1b\$[@B]": "iso2022_jp", rb"\x1b\$\(D": "iso2022_jp_2", rb"\x1b\$\)C": "iso2022_kr"}
    return next((name for mark, name in marks.items() if re.search(mark, line)), None)


def unmarked_utf16(sample: bytes) -> str | None:
    """Return the UTF-16 that a file without zero bytes is in by its first bytes: a text of Chinese or Japanese."""
    for name in ("utf-16-le", "utf-16-be"):
        if _is_readable(sample, name):
            text = codecs.getincrementaldecoder(name)().decode(sample)
            usual = len(re.findall(f"{_HAN}|{_JAPANESE}|[\\s -~]", text))
            # bytes of Shift JIS are Chinese characters too, but rare ones
            if usual > 0.95 * len(text) and re.search("[\u3001\u3002\uff0c\u3040-\u30ff的一是不了]", text):
                return name
    return None


def likely_encoding(sample: bytes) -> str:
    """Return the name of the encoding that bytes which are not UTF-8 are probably in."""
    # accents stand between plain letters
    runs = re.findall(rb"[\x80-\xff]+", sample)
    is_sparse = sum(map(len, runs)) <= 2 * len(runs)
    scores = {name: _score(sample, name, usual) for name, usual in _USUAL.items()}
    for name in scores:
        scores[name] *= 1.0 if is_sparse == (name in _ACCENTED) else 0.3
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] > 0 else "cp1252"


def _score(sample: bytes, encoding: str, usual: str) -> float:
    """Return the share of characters beside ASCII that are usual in an encoding, with a bonus for frequent letters.

    It is 0 if the encoding does not have the bytes.
    """
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)  # its end may be inside a character
    except UnicodeDecodeError:
        return 0.0
    foreign = re.sub(r"[\x00-\x7f]", "", text)
    if not foreign or (usual == _JAPANESE and not re.search("[\u3040-\u30ff]", foreign)):
        return 0.0
    counts = [len(re.findall(letters, foreign)) for letters in (usual, _FREQUENT.get(usual, "(?!)"))]
    return (counts[0] + 0.2 * counts[1]) / len(foreign)
