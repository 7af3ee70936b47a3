"""Files in the user's cache folder: what was measured once, for the jobs that come after."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any


def path_of(kind: str, facts: Any) -> Path:
    """The file of what `kind` names, for everything that agrees on `facts`, which are plain data."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return home / "paceline" / f"{kind}-{digest}.json"


def replace(path: Path, text: str) -> None:
    """Write a file at once, so that nobody reads a part of it; one that cannot be written is not."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{secrets.token_hex(8)}")
        fresh.write_text(text)
        fresh.replace(path)
