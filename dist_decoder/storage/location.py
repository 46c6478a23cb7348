"""Which kind of location a path or URL is."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from dist_decoder.config.secrets import require_no_secrets
from dist_decoder.config.storage import StorageConfig
from dist_decoder.errors import StorageError
from dist_decoder.storage.local import LocalStorage
from dist_decoder.storage.objects import ObjectStorage
from dist_decoder.storage.protocol import Storage

_SCHEMES = ("s3", "gs", "az", "http", "https")


def is_object_store(location: str | Path) -> bool:
    """Return whether a location is a URL of an object store and not a folder."""
    text = str(location)
    return not isinstance(location, Path) and "://" in text and not text.startswith("file:")


def open_location(location: str | Path, policy: StorageConfig | None = None) -> Storage:
    """Return the storage at a folder or at an ``s3://``, ``gs://``, ``az://``, ``http(s)://`` URL.

    Nothing is read: a location that does not exist is reported by the first access.

    Args:
        location: without passwords and signatures; credentials come from the environment.
        policy: retries, deadlines and hedges of an object store; None takes the defaults.

    Raises:
        StorageError: the scheme is unknown, the URL carries a secret, or the extra
            ``object-store`` is not installed.
    """
    text = str(location)
    if isinstance(location, Path) or "://" not in text:
        return LocalStorage(Path(location))
    scheme = text.split("://", 1)[0].lower()
    if scheme == "file":
        return LocalStorage(Path(unquote(urlsplit(text).path)))
    try:
        require_no_secrets(text)
    except ValueError as error:
        raise StorageError(str(error)) from None
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise StorageError(f"{text}: unknown scheme {scheme!r}; use a folder or one of {known}")
    return ObjectStorage(text, policy)


def join_location(location: str | Path, *names: str) -> str | Path:
    """Return the place of ``names`` below a folder or URL."""
    if is_object_store(location):
        return "/".join([str(location).rstrip("/"), *names])
    return Path(location, *names)
