"""Which Ray cluster a launch joins, who said so, and whether anything answers there: asked before Ray is.

Ray itself looks for a cluster that is gone for minutes, in calls that no signal interrupts. Here every question runs in
a thread with a limit, so that the main thread hears signals at once.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sweeps.core.cells import UserError

_CONNECT_SECONDS = 5.0  # for a TCP connection to the head
_ANSWER_SECONDS = 30.0  # for Ray's own answer, once something listens there
_T = TypeVar("_T")


@dataclass(frozen=True)
class Address:
    """text: `local`, or where the cluster is. said_by: the option or variable that names it, for the user to change."""

    text: str
    said_by: str

    def trouble(self, reason: object) -> UserError:
        """The error for a cluster that does not answer, or that asks for a token."""
        if "uth" in str(reason) and "oken" in str(reason):
            return UserError(
                f"the Ray cluster at {self.text} asks for a token that this user lacks; copy its ~/.ray/auth_token, or "
                "name that file: export RAY_AUTH_TOKEN_PATH=FILE"
            )
        undo = f"unset {self.said_by}" if self.said_by.isupper() else f"leave out {self.said_by}"
        return UserError(
            f"no Ray cluster answers at {self.text} ({' '.join(str(reason).split())}); start one there with "
            f"`ray start --head`, or {undo}, which names it, to use this machine alone"
        )


def named(asked: str | None) -> Address:
    """The address that the command line names, else $RAY_ADDRESS, else this machine alone.

    As in Ray, `auto` is what $RAY_ADDRESS names where it is set.
    """
    known = os.environ.get("RAY_ADDRESS", "")
    if known and (not asked or asked == "auto"):
        return Address(known, "RAY_ADDRESS")
    return Address(asked, "--address") if asked else Address("local", "")


def check(asked: str | None) -> Address:
    """The address that is named; raises UserError within seconds where it names a cluster and none answers there."""
    address = named(asked)
    if address.text == "local":
        return address
    try:
        versions = _knock(address.text)
    except Exception as error:  # Ray has its own for an answer that is none of Ray's
        raise address.trouble(error or type(error).__name__) from error
    check_versions(address.text, versions)
    return address


def check_versions(where: str, theirs: Mapping[str, Any]) -> None:
    """Raise UserError for a cluster of another Ray or Python than Ray itself would join."""
    from ray._private.utils import check_version_info, compute_version_info

    if not {"ray_version", "python_version"} <= theirs.keys():
        return
    try:
        check_version_info(dict(theirs), "")
    except RuntimeError as error:
        ray, python = compute_version_info()
        raise UserError(
            f"the Ray cluster at {where} has Ray {theirs['ray_version']} and Python {theirs['python_version']}, here "
            f"are Ray {ray} and Python {python}; install here what the cluster has, or restart it with what is here"
        ) from error


def _knock(text: str) -> dict[str, Any]:
    """Open a connection, and ask Ray's head what it is; raises whatever either raises.

    Returns what it tells of itself, versions among it; nothing for an address of Ray Client.
    """
    if "://" in text:
        parts = urlsplit(text)
        _within(_CONNECT_SECONDS, lambda: _open(parts.hostname or "", parts.port or 10001))
        return {}
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    place = canonicalize_bootstrap_address_or_die(text)
    host, _, port = place.rpartition(":")
    _within(_CONNECT_SECONDS, lambda: _open(host.strip("[]"), int(port)))
    logging.getLogger("ray").setLevel(logging.ERROR)  # as `ray.init` is told, which sets it too late for the next line
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as `ray.init` does before it asks
    return _within(_ANSWER_SECONDS, lambda: _told(GcsClient(address=place)))


def _told(head: Any) -> dict[str, Any]:
    """What a head tells of its cluster; nothing from one that has only just started."""
    from ray._common.usage.usage_lib import get_cluster_metadata

    try:
        return get_cluster_metadata(head)
    except AttributeError:  # Ray decodes an answer that is not there yet
        return {}


def _open(host: str, port: int) -> None:
    with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
        pass


def _within(seconds: float, work: Callable[[], _T]) -> _T:
    """The result of `work`, done in a thread; raises what it raises, and TimeoutError when it takes longer."""
    results: list[_T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="knock", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"nothing that speaks Ray's protocol within {seconds:g} s")
    return results[0]
