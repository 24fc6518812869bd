"""Keys and passwords: an environment variable carries them, and no file, body or message of ours holds one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from lightning_interp.errors import RecipeError

__all__ = ["check_address", "check_no_secret", "check_settings", "holds_secret", "keep_secret", "redacted"]

_VARIABLES = {"OPENAI_API_KEY", "HF_TOKEN"}
_SHORTEST = 6  # letters of a secret; words such as "none" and "EMPTY" stand for no key
_NAME = re.compile(r"(?i)(^|[-_.])(api[-_]?key|key|token|secret|passw(or)?d|pwd|sig|signature|auth(orization)?)$")
_USER = re.compile(r"://[^/\s@]+@")  # and perhaps a password, before the host
_LOOKS_SECRET = re.compile(r"(?<![A-Za-z0-9])(sk|hf|gsk|pk|xai)[-_][A-Za-z0-9_-]{16,}")


def keep_secret(variable: str) -> None:
    """Say that an environment variable holds a secret."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable) or _LOOKS_SECRET.search(variable):
        raise RecipeError(
            "api_key_env is no name of an environment variable. Give the name of the one that holds the key, such as "
            "OPENAI_API_KEY, and not the key."
        )
    _VARIABLES.add(variable)


def redacted(value: Any) -> Any:
    """Return a text, or the texts in lists and mappings, with ``***`` in place of each secret."""
    if isinstance(value, str):
        for secret in _secrets():
            value = value.replace(secret, "***")
        return value
    if isinstance(value, Mapping):
        return {redacted(key): redacted(item) for key, item in value.items()}
    return [redacted(item) for item in value] if isinstance(value, list | tuple) else value


def check_address(address: str | None, name: str = "base_url") -> None:
    """Refuse an address that is none of the web, or that holds a user, a password or a key."""
    if not address:
        return
    try:
        parts = urlsplit(address)
        web, user = parts.scheme in ("http", "https") and bool(parts.hostname), "@" in parts.netloc
        asked = any(_NAME.search(key) for key, _ in parse_qsl(parts.query, keep_blank_values=True))
    except ValueError:
        web = user = asked = False
    if user or asked or _LOOKS_SECRET.search(address) or redacted(address) != address:
        raise RecipeError(
            f"{name} holds a user, a password or a key, and would be written into files. Leave it out of the address: "
            "an environment variable carries it (api_key_env)."
        )
    if not web or not address.isprintable():
        raise RecipeError(f"{name}={address!r}: expected an address such as http://localhost:8000/v1.")


def holds_secret(value: Any) -> bool:
    """Whether a setting holds the value of a secret, or an address with a user or a password."""
    if isinstance(value, Mapping):
        return any(map(holds_secret, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_secret, value))
    return isinstance(value, str) and bool(redacted(value) != value or _USER.search(value))


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings that hold a secret; ``..._url`` is an address, ``..._key_env`` names the variable of a key."""
    for name, value in settings.items():
        if name.endswith("_url"):
            check_address(value, name)
        if name.endswith("_key_env"):
            keep_secret(value)
    if lost := next((name for name, value in settings.items() if holds_secret(value)), None):
        raise RecipeError(
            f"{lost} holds a key, or an address with a user or a password, and settings are written into files. Leave "
            "it out: an environment variable carries it."
        )


def check_no_secret(settings: Mapping[str, Any], name: str) -> None:
    """Refuse settings that are written into files and hold a secret, by the names of their keys or by value."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            check_no_secret(value, f"{name}[{key!r}]")
        elif (isinstance(value, str) and _NAME.search(key)) or redacted(value) != value:
            raise RecipeError(
                f"{name} holds a key or a password as {key!r}, and would be written into files. Leave it out: an "
                "environment variable carries it (api_key_env)."
            )


def _secrets() -> list[str]:
    """Values of the variables, and as they stand in an address; the longest first."""
    values = {os.environ.get(name, "").strip() for name in _VARIABLES}
    values = {value for value in values if len(value) >= _SHORTEST}
    return sorted(values | {quote(value, safe="") for value in values}, key=len, reverse=True)
