"""What an object store's error means: whether to ask again, and what the user can do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from dist_decoder.config.secrets import without_secrets

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>\s*(\w+)\s*</Code>|\"(?:code|error)\":\s*\"(\w+)\"")
_TOKEN_SOURCES = ("169.254.169.254", "169.254.170.2", "metadata.google.internal", "/api/token")
"""Where a client looks for credentials when the environment holds none."""
_ASK_AGAIN = {408, 425, 429}
_ENVIRONMENT = (
    "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for temporary keys, AWS_SESSION_TOKEN"
    " (profiles are not read: `aws configure export-credentials --format env` prints them), or"
    " the variables of your provider (docs/object-storage.md)"
)
_REMEDIES = {
    "RequestTimeTooSkewed": "the clocks of this machine and of the server differ by more than the"
    " server allows (15 minutes); set the clock (`timedatectl set-ntp true`, or ask the"
    " administrator)",
    "RequestExpired": "the clock of this machine is wrong, or a signed URL is out of date; set the"
    " clock or sign again",
    "ExpiredToken": "the session token has expired; get new temporary credentials, put them into"
    " the environment and start the command again, it goes on where it stopped",
    "InvalidAccessKeyId": f"the server does not know the access key; {_ENVIRONMENT}",
    "SignatureDoesNotMatch": "the secret key is wrong, or a proxy changed the request;"
    f" {_ENVIRONMENT}",
    "InvalidToken": f"the session token is not valid; {_ENVIRONMENT}",
    "AccessDenied": "the credentials do not allow this, or the object does not exist (a bucket"
    " without list permission answers both alike); check the name and ask for s3:GetObject, and"
    " for s3:PutObject to write",
    "NoSuchBucket": "the bucket does not exist; check its name, the region and the endpoint",
}
_REMEDIES["TokenRefreshRequired"] = _REMEDIES["ExpiredTokenException"] = _REMEDIES["ExpiredToken"]
_DENIED = f"access is denied; {_ENVIRONMENT}"


@dataclass(frozen=True)
class Failure:
    """An error of one attempt, understood."""

    text: str
    """What happened and what to do, without secrets."""
    final: bool
    """Asking again would give the same answer."""
    missing: bool = False
    """The object does not exist."""
    unexplained: bool = False
    """Refused without a reason: answers to HEAD have no body. A GET tells."""


def understand(error: BaseException) -> Failure:
    """Return what an exception of obstore, or of a check of ours, means."""
    whole = str(error)
    status = _status(whole)
    code = _code(whole)
    if any(place in whole for place in _TOKEN_SOURCES):
        return Failure(f"there are no credentials; {_ENVIRONMENT}", final=True)
    if code in _REMEDIES:
        missing = isinstance(error, FileNotFoundError) and code != "NoSuchBucket"
        return Failure(f"{code}: {_REMEDIES[code]}", final=True, missing=missing)
    if isinstance(error, FileNotFoundError):
        return Failure("does not exist", final=True, missing=True)
    kind = type(error).__name__
    # Lists are refused by an error of no special kind.
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or status in (401, 403):
        reason = f"{without_secrets(code)}: {_DENIED}" if code else f"{status or kind}: {_DENIED}"
        return Failure(reason, final=True, unexplained=code is None)
    if kind == "PreconditionError":
        return Failure("the object was replaced while it was read; start again", final=True)
    if "non-partial response" in whole:
        return Failure(
            "the server answers a range with the whole object; use a server that knows ranges",
            final=True,
        )
    if status == 416:
        return Failure(
            "the object ends before the range: it is truncated or was replaced; copy it again",
            final=True,
        )
    if status is not None and 400 <= status < 500 and status not in _ASK_AGAIN:
        return Failure(
            f"the server refused: {_first_line(error)}; check URL, region and endpoint",
            final=True,
            unexplained=code is None,
        )
    return Failure(_first_line(error), final=False)


def _status(text: str) -> int | None:
    found = _STATUS.search(text)
    return int(found.group(1)) if found else None


def _code(text: str) -> str | None:
    found = _CODE.search(text)
    return (found.group(1) or found.group(2)) if found else None


def _first_line(error: BaseException) -> str:
    line: Any = next(iter(str(error).splitlines()), "") or type(error).__name__
    return without_secrets(line)
