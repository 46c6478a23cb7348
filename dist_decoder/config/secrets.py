"""Keep secrets out of messages, logs and saved files."""

from __future__ import annotations

import os
import re

_SECRET_VARIABLES = re.compile(
    r"SECRET|TOKEN|PASSWORD|SAS|ACCOUNT_KEY|ACCESS_KEY$|CREDENTIAL|SERVICE_ACCOUNT_KEY", re.I
)
_CLOUD_VARIABLES = re.compile(r"^(AWS|AZURE|GOOGLE|GCS|MSI|IDENTITY)_", re.I)
_USER_PART = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@'\"]*@")
_QUERY = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s?'\"<>]*)\?[^\s'\"<>]*")
_HIDDEN = "[hidden]"
_SHORTEST = 6
"""Shorter values of variables are no secrets, and would blank out ordinary words."""


def without_secrets(text: str) -> str:
    """Return a text without passwords, query strings of URLs and secrets of the environment."""
    text = _USER_PART.sub(rf"\1{_HIDDEN}@", text)
    text = _QUERY.sub(rf"\1?{_HIDDEN}", text)
    for name, value in os.environ.items():
        if (
            len(value) >= _SHORTEST
            and _CLOUD_VARIABLES.search(name)
            and _SECRET_VARIABLES.search(name)
        ):
            text = text.replace(value, _HIDDEN)
    return text


def require_no_secrets(location: str) -> str:
    """Return a location that can be printed and saved as it is.

    Raises:
        ValueError: it is a URL with a user, a password or a query string.
    """
    if "://" not in location:
        return location
    if _USER_PART.search(location) or "?" in location:
        raise ValueError(
            f"{without_secrets(location)} carries a password or a signature, which would be saved"
            " with the configuration; give the bare URL, and the credentials by environment"
            " variables (see docs/object-storage.md)"
        )
    return location
