"""Where this user's machine keeps what can be made again."""

import os
from pathlib import Path


def cache_home() -> Path:
    """$XDG_CACHE_HOME/srunit, ~/.cache/srunit where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srunit"
