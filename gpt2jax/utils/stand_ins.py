"""Files that stand in for the file that was meant: Git LFS pointers and pages of web sites."""

from __future__ import annotations

import re

_PAGE = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head)\b", re.IGNORECASE | re.DOTALL)


def describe_stand_in(start: bytes) -> str | None:
    """Return what the first bytes of a file say that it is, and what to do; None unless it only stands for another."""
    if start.startswith(b"version https://git-lfs.github.com/"):
        return "is a Git LFS pointer: fetch the file itself (git lfs pull, or download it from the site)"
    if _PAGE.match(start.removeprefix(b"\xef\xbb\xbf")):
        return "is an HTML page, such as that of an error or a login: download the file itself"
    return None
