"""Passwords and keys stay where they were given: what is shown or written down says *** in their place."""

import os
import re
from urllib.parse import unquote

HIDDEN = "***"
LEAST = 8  # characters of a key; a shorter one may be any word
# USER:PASSWORD@ or TOKEN@ before a host; the password may hold any character, unescaped as people write it.
_IN_URL = re.compile(r"(?<=://)(?:[^\s/'\"]*|[^\s/'\":]*:[^\s'\"]*)(?=@)")
_IN_QUERY = re.compile(
    r"([?&](?:[\w-]*(?:password|passwd|secret|token|signature|credential|api_?key|accesskeyid))=)[^&\s'\"]+", re.I
)
_VARIABLE = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|ACCESS_KEY|API_?KEY", re.I)
_PLACES = ("_FILE", "_PATH", "_DIR", "_URI", "_URL")  # variables that say where a secret lies


def redacted(text: str) -> str:
    """The text without the passwords of its URLs, and without the values of environment variables that hold a secret."""
    text = _IN_QUERY.sub(rf"\1{HIDDEN}", _IN_URL.sub(HIDDEN, text))
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


def holds_secret(text: str) -> bool:
    """Whether a text that the user gives, such as an URL, has a password in it."""
    return redacted(text) != text


def _secrets() -> list[str]:
    """Of this process's environment, the longest first, since one may be part of another."""
    found = {value for name, value in os.environ.items() if _VARIABLE.search(name) and not name.endswith(_PLACES)}
    for value in os.environ.values():
        passwords = {part.partition(":")[2] for part in _IN_URL.findall(value)}
        found |= passwords | {unquote(password) for password in passwords}
    return sorted((value for value in found if len(value) >= LEAST), key=len, reverse=True)
