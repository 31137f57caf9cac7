"""What a checkpoint on the Hub is, read from its config files and the headers of its weights."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, LocalEntryNotFoundError

from .checkpoint_facts import CONFIG_FILES, PARTS, facts_of


def remote_facts(checkpoint: str) -> dict:
    """`facts_of` a Hub id (`id@revision`), and "revision", the commit; no weights are downloaded.

    Raises:
        FileNotFoundError: a repository without checkpoint. OSError: one that cannot be read.
    """
    repo_id, _, revision = checkpoint.partition("@")
    found: list[str] = []
    try:
        for name in CONFIG_FILES:
            try:
                path = hf_hub_download(repo_id, name, revision=revision or None)
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError) and not found and name == "config.json":
                    raise  # no network and nothing in the cache
                continue
            found.append(name)
            folder = Path(path).parents[name.count("/")]
            revision = folder.name
    except (HTTPError, HFValidationError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        refused = status in (401, 403, 404)  # not to be tried again
        message = f"cannot read {checkpoint!r} from the Hub: {' '.join(str(error).split())}"
        raise OSError(message) from None if refused else error
    if not {"config.json", "model_index.json"} & set(found):
        raise FileNotFoundError(f"{repo_id} is no checkpoint: it has no config.json or model_index.json.")
    facts = facts_of(folder) | {"revision": revision}
    facts["parameters"] = facts["parameters"] or _remote_parameters(repo_id, revision, found)
    facts["fingerprint"] = facts["fingerprint"] or _remote_sha256(repo_id, revision)
    return facts


def _remote_parameters(repo_id: str, revision: str, found: list[str]) -> dict[str, int]:
    """As `count_parameters`, from the headers of the files; without those that cannot be had."""
    counts = {}
    for part in PARTS:
        if part and f"{part}/config.json" not in found:
            continue
        for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
            try:
                path = f"{part}/{name}".lstrip("/")
                metadata = HfApi().parse_safetensors_file_metadata(repo_id, path, revision=revision)
            except (EntryNotFoundError, HTTPError, OSError):
                continue
            counts[part or "model"] = sum(metadata.parameter_count.values())
            break
    return counts


def _remote_sha256(repo_id: str, revision: str) -> str | None:
    try:
        etag = get_hf_file_metadata(hf_hub_url(repo_id, "model.safetensors", revision=revision)).etag or ""
    except (EntryNotFoundError, HTTPError, OSError):
        return None
    return etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None
