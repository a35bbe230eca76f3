"""Files of a model on the Hugging Face hub, each fault one line, and none waited for longer than some seconds."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

HUB_SECONDS = 10.0
_LOCAL = "give a local copy with --set models=DIR"


class LMUnavailable(RuntimeError):
    """The weights are unreachable from here; the message names what works instead."""


def require_hub(remedy: str) -> None:
    """Raise LMUnavailable, with the remedy, where the hub does not answer within `HUB_SECONDS`: clients would retry."""
    from huggingface_hub import constants

    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answers; if it refuses a file, loading that file reports it
    except OSError as error:
        raise LMUnavailable(
            f"the Hugging Face hub ({constants.ENDPOINT}) cannot be reached ({error}); {remedy}"
        ) from error


def hub_file(hub_id: str, file: str, revision: str | None) -> Path | None:
    """A file of a model's repository in the local cache, downloaded where it is not there; None if it has no such file.

    Raises ValueError for a repository that does not exist, LMUnavailable where it is gated or cannot be reached.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    cached = try_to_load_from_cache(hub_id, file, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    require_hub(f"{hub_id} is not cached; {_LOCAL}")
    try:
        return Path(
            hf_hub_download(hub_id, file, revision=revision, etag_timeout=HUB_SECONDS, endpoint=constants.ENDPOINT)
        )
    except RemoteEntryNotFoundError:
        return None
    except Exception as error:  # the hub's client passes on its HTTP library's errors, and has changed the library
        raise _refused(hub_id, file, error) from error


def _refused(hub_id: str, file: str, error: Exception) -> Exception:
    """What a failed request means, in one line."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return LMUnavailable(
            f"{hub_id} is gated on the Hugging Face hub; accept its terms there and log in (hf auth login), or {_LOCAL}"
        )
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return ValueError(
            f"{hub_id} is no model on the Hugging Face hub that can be read from here; check OWNER/NAME, log in if it "
            f"is private, or {_LOCAL}"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return LMUnavailable(f"{file} of {hub_id} cannot be read from the hub ({reason}); {_LOCAL}")


def require_weights(hub_id: str, revision: str | None) -> None:
    """Raise ValueError where a repository holds no safetensors, LMUnavailable where it cannot be asked."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    names = ("model.safetensors", "model.safetensors.index.json")
    if any(isinstance(try_to_load_from_cache(hub_id, name, revision=revision), str) for name in names):
        return
    require_hub(f"{hub_id} is not cached; {_LOCAL}")
    for name in names:
        try:
            url = hf_hub_url(hub_id, name, revision=revision, endpoint=constants.ENDPOINT)
            get_hf_file_metadata(url, timeout=HUB_SECONDS)
            return
        except RemoteEntryNotFoundError:
            continue
        except Exception as error:  # the hub's client passes on its HTTP library's errors, and has changed the library
            raise _refused(hub_id, name, error) from error
    raise ValueError(
        f"{hub_id} holds no safetensors on the hub; other formats are not read: choose another model, or convert it "
        "and give the folder with --set models=DIR"
    )
