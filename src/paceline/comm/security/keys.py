"""The key that all processes of a job share, and keys derived from it.

A launcher of ours gives its workers a key made for the job. Processes that another launcher started read a
key that their account has on every host: the file named by PACELINE_SECRET_FILE, else
`~/.config/paceline/key`, which is made when it is first needed. A home directory that all hosts share needs
nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from paceline.comm.security.private_folder import private_folder
from paceline.errors import ConfigError
from paceline.options import JobOptions
from paceline.user_input import read_text

FILE_VARIABLE = "PACELINE_SECRET_FILE"
_LEAST_CHARACTERS = 16
_MOST_BYTES = 1 << 16


def read_secret(path: Path, *, what: str = "--secret-file") -> str:
    """The secret in `path`: at least 16 characters, in a file that only its owner can read.

    Args:
        path: The file.
        what: The option or variable that named it, for errors.

    Raises:
        ConfigError: It cannot be read, others can read it, or it is too short.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} {path}: cannot be read: {error}") from None
    if stat.S_ISREG(mode) and mode & 0o077:
        raise ConfigError(f"{what} {path}: others can read it; run `chmod 600 {path}`")
    text = read_text(path, what=what, most_bytes=_MOST_BYTES).strip()
    if len(text) < _LEAST_CHARACTERS:
        raise ConfigError(
            f"{what} {path}: at least {_LEAST_CHARACTERS} characters expected, got {len(text)}; "
            f"make one with `openssl rand -hex 32 > {path}`"
        )
    return text


def job_key(environment: Mapping[str, str]) -> bytes:
    """The key that our launcher gave this process, else that of its account; errors as `account_key`."""
    if given := JobOptions.from_environment(environment).secret:
        return bytes.fromhex(given)
    return account_key(environment)


def account_key(environment: Mapping[str, str]) -> bytes:
    """The key of this account.

    Raises:
        ConfigError: PACELINE_SECRET_FILE names a file that `read_secret` refuses, or no file can be made.
    """
    if named := environment.get(FILE_VARIABLE):
        return read_secret(Path(named), what=FILE_VARIABLE).encode()
    for folder in _key_folders(environment):
        path = folder / "key"
        with contextlib.suppress(OSError):
            _make_once(path)
            return read_secret(path, what="the key of this account").encode()
    path = private_folder() / "key"
    _make_once(path)
    return read_secret(path, what="the key of this account").encode()


def derive(key: bytes, *purpose: str) -> bytes:
    """A key for one purpose: who learns it learns neither `key` nor keys for other purposes."""
    return hmac.new(key, "\0".join(("paceline", *purpose)).encode(), hashlib.sha256).digest()


def _key_folders(environment: Mapping[str, str]) -> list[Path]:
    if base := environment.get("XDG_CONFIG_HOME"):
        return [Path(base) / "paceline"]
    if home := environment.get("HOME"):
        return [Path(home) / ".config" / "paceline"]
    return []


def _make_once(path: Path) -> None:
    """Make the key file unless it is there. Processes that do this at the same time find the same key."""
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = path.with_name(f"key.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(own, path)
    finally:
        own.unlink()
