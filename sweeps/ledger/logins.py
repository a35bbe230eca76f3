"""Passwords in addresses: they are used, and never printed, written or shown in the process list.

`remember` cuts `user:password@` out of an address and keeps it in this process's environment, under the address's
scheme and host; `with_login` puts it back where a connection is made. A command line that carries a password is
replaced by one that does not before anything else starts, since process lists and Ray's job table show command lines.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit, urlunsplit

from sweeps.core.cells import UserError

VARIABLE = "PLUMBLINE_LOGINS"  # JSON {scheme://host: user:password}
_LOGIN = re.compile(r"(?<=://)[^/\s]*@")  # up to the last @ before the path
_IN_QUERY = re.compile(
    r"[?&;#](key|sas|auth|[^=&;#]*(?:pass|pwd|secret|token|sig|credential|api[_-]?key|access[_-]?key)[^=&;#]*)=",
    re.IGNORECASE,
)
_CUT_LOGIN = re.compile(r"://[^/?#@\s]*:[^/?#@\s]*[/?#][^\s]*@")  # user:pa/ss@host: the address ends before the @
_BLANK = re.compile(r"://[^/?#@]*\s[^/?#]*@")
_NO_SCHEME = re.compile(r"(?://)?[^/@]*:[^/@]*@")
_CHAINED = re.compile(r"[^/]*::")


def without_password(text: str) -> str:
    """An address, or any text that holds addresses, without their user names and passwords."""
    return _LOGIN.sub("", text)


def _place(uri: str) -> str:
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def logins() -> dict[str, str]:
    """What this process knows: {scheme://host: user:password}."""
    return json.loads(os.environ.get(VARIABLE, "{}"))


def remember(uri: str) -> str:
    """The address without its login, which this process keeps for `with_login`."""
    login, at, _ = urlsplit(uri).netloc.rpartition("@") if "://" in uri else ("", "", "")
    if not at:
        return uri
    os.environ[VARIABLE] = json.dumps({**logins(), _place(uri): login})
    return without_password(uri)


def given(uri: str, option: str) -> str:
    """The address of an option without its login, which this process keeps.

    Raises UserError, which never shows the password: for one in the query, where every library would show and store it
    with the address, for one with a raw /, ? or #, which ends the address early, for one with a blank, for a login in a
    chained address, and for one without a scheme, which would be the name of a folder.
    """
    if _BLANK.search(uri) or _NO_SCHEME.match(uri):
        raise UserError(
            f"{option} has a login with a blank in it, or one without a scheme before it (not shown, since it may be a "
            "password); write SCHEME://USER:PASSWORD@HOST/…, and a blank as %20"
        )
    if _CUT_LOGIN.search(uri):
        raise UserError(
            f"{option} has an @ after a /, ? or # that ends its host (not shown, since it may be a password); write "
            "these signs in a user's name or password as %2F, %3F, %23, and @ as %40"
        )
    if _CHAINED.match(uri) and _LOGIN.search(uri):
        raise UserError(
            f"{option} is a chained address with a login, which could not be kept secret; give the login by the "
            "storage's own variables or configuration files"
        )
    if found := _IN_QUERY.search(uri):
        raise UserError(
            f"{option} {without_password(uri[: found.start()])} has {found[1]}=… after its '?', where it would be "
            "shown and stored; write scheme://USER:PASSWORD@HOST/…, which is kept secret"
        )
    return remember(uri)


def with_login(uri: str) -> str:
    """The address with the login known for its scheme and host, for the call that connects and nothing else."""
    if "://" not in uri or "@" in urlsplit(uri).netloc or (login := logins().get(_place(uri))) is None:
        return uri
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=f"{login}@{parts.netloc}"))


def http_login(uri: str) -> tuple[str, str] | None:
    """(user, password) known for an http address, for libraries that take them apart from it."""
    login = logins().get(_place(uri)) if uri.startswith("http") else None
    user, colon, password = (login or "").partition(":")
    return (unquote(user), unquote(password)) if colon else None


def hide_arguments() -> None:
    """Start this program again without the passwords of its command line, which move into its environment."""
    cleaned = [_remember_all(text) for text in sys.argv[1:]]
    if cleaned != sys.argv[1:]:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *_interpreter_options(), sys.argv[0], *cleaned])


def clean_arguments(arguments: Sequence[str]) -> list[str]:
    """Arguments without passwords, which this process remembers."""
    return [_remember_all(text) for text in arguments]


def _remember_all(text: str) -> str:
    for uri in re.findall(r"[a-z0-9+.-]+://[^/\s]*@[^\s,]*", text, flags=re.IGNORECASE):
        remember(uri)
    return without_password(text)


def _interpreter_options() -> list[str]:
    original = sys.orig_argv[1:]
    return original[: original.index(sys.argv[0])] if sys.argv[0] in original else []
