"""SAEs on the Hugging Face hub: RELEASE:ID to a folder on this machine that `folders` reads.

RELEASE is a name of SAELens' list (`pretrained_saes.yaml`) or OWNER/NAME on the hub, ID the SAE's name in the list or
its folder in the repository. Files in SAELens' and dictionary_learning's own formats are read where the hub's client
puts them. Others are converted once by SAELens' loader for that release, which also folds in the scaling that the list
gives, and kept in the cache in SAELens' format.
"""

from __future__ import annotations

import warnings
from hashlib import sha256
from pathlib import Path, PurePosixPath

from models.host.cache import cache_root, cached_directory
from models.sae.folders import DICTIONARY_FILES
from models.sae.saelens import CONFIG_FILE, WEIGHTS_FILE


def fetch(release: str, sae_id: str) -> Path:
    """The folder of an SAE, downloaded where it is not in the cache.

    Raises ValueError (one line) for a release or ID that does not exist, and without a network.
    """
    if PurePosixPath(sae_id).is_absolute() or ".." in PurePosixPath(sae_id).parts or "\\" in sae_id:
        raise ValueError(f"ID {sae_id!r} leads out of its repository; give the SAE's folder in it")
    repository, folder, converted = release, sae_id, False
    if "/" not in release:
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

        known = get_pretrained_saes_directory().get(release)
        if known is None:
            raise ValueError(f"release {release!r} is not in SAELens' list; give one of it, or OWNER/NAME on the hub")
        if sae_id not in known.saes_map:
            some = ", ".join(list(known.saes_map)[:3])
            raise ValueError(f"release {release} has no SAE {sae_id!r}; it has {some}, …")
        repository, folder = known.repo_id, known.saes_map[sae_id]
        converted = known.conversion_func not in (None, "sae_lens") or sae_id in known.norm_scaling_factor
    return _converted(release, sae_id) if converted else _downloaded(repository, folder)


def _downloaded(repository: str, folder: str) -> Path:
    """The folder in the hub's cache with config and weights of one commit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        for config, weights in ((CONFIG_FILE, WEIGHTS_FILE), DICTIONARY_FILES):
            try:
                file = Path(hf_hub_download(repository, f"{folder}/{config}"))
            except EntryNotFoundError:
                continue
            commit = file.parents[len(PurePosixPath(folder).parts)].name
            hf_hub_download(repository, f"{folder}/{weights}", revision=commit)
            return file.parent
    except Exception as error:  # the hub's client passes on its HTTP library's errors
        text = " ".join(str(error).split())
        raise ValueError(f"{repository}:{folder} cannot be read from the hub ({text[:200]}); give a folder") from error
    raise ValueError(f"{repository} holds neither {folder}/{CONFIG_FILE} nor {folder}/{DICTIONARY_FILES[0]}")


def _converted(release: str, sae_id: str) -> Path:
    def build(folder: Path) -> None:
        from sae_lens import SAE

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                SAE.from_pretrained(release, sae_id, device="cpu").save_model(folder)
        except Exception as error:  # its loaders raise whatever their files and the hub's client make of it
            text = " ".join(str(error).split())
            raise ValueError(f"{release}:{sae_id} cannot be read by SAELens ({text[:200]}); give a folder") from error

    name = sha256(f"{release}:{sae_id}".encode()).hexdigest()[:16]
    return cached_directory(cache_root() / "saes", name, build)
