"""Files of the Hugging Face hub: from the local cache where they are complete, else fetched, with short patience."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from lsiq.errors import InputError

# Seconds until the hub counts as out of reach. The library's own retries take half a minute.
PATIENCE = 3.0


def fetch_snapshot(repository: str, revision: str, patterns: list[str], complete: Any, way_out: str) -> Path:
    """Return the folder of a repository's files that match `patterns`.

    Args:
        complete: tells of a cached folder whether it has all that is needed; only then is the network left alone.
        way_out: what the message tells the user to do when neither cache nor hub has the files.

    Raises:
        InputError: within a few seconds, when the hub is out of reach or has no such repository or revision.
    """
    import huggingface_hub

    try:
        cached = Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=patterns, local_files_only=True
            )
        )
        if complete(cached):
            return cached
    except (OSError, huggingface_hub.errors.HfHubHTTPError):
        pass  # not in the cache: ask the hub
    _check_reach(repository, revision, "model", way_out)
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # network libraries raise many kinds; all mean that the download did not finish
        raise InputError(_message(repository, revision, error, way_out)) from error


def fetch_file(repository: str, name: str, revision: str, kind: Literal["model", "dataset"], way_out: str) -> Path:
    """Return one file of a repository, from the cache or the hub; errors as `fetch_snapshot`."""
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.hf_hub_download(repository, name, repo_type=kind, revision=revision, local_files_only=True)
        )
    except (OSError, huggingface_hub.errors.HfHubHTTPError):
        pass
    _check_reach(repository, revision, kind, way_out)
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, repo_type=kind, revision=revision))
    except Exception as error:  # as above
        raise InputError(_message(repository, revision, error, way_out)) from error


def _check_reach(repository: str, revision: str, kind: Literal["model", "dataset"], way_out: str) -> None:
    """Ask once, briefly, whether the hub answers and knows the repository, before anything that retries."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise InputError(f"{repository}: not in the cache, and HF_HUB_OFFLINE forbids to fetch it; {way_out}")
    api = huggingface_hub.HfApi()
    ask = api.model_info if kind == "model" else api.dataset_info
    try:
        ask(repository, revision=revision, timeout=PATIENCE)
    except Exception as error:  # DNS, proxy, TLS, HTTP: each has its own class
        raise InputError(_message(repository, revision, error, way_out)) from error


def _message(repository: str, revision: str, error: Exception, way_out: str) -> str:
    import huggingface_hub

    cache = huggingface_hub.constants.HF_HUB_CACHE
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        cause = "the hub asks for a login or an accepted licence (huggingface-cli login)"
    elif status == 404:
        cause = f"the hub has no such repository or revision {revision}"
    else:
        cause = f"the hub cannot be reached ({type(error).__name__})"
    return (
        f"{repository}: not in the cache {cache} (HF_HOME={os.environ.get('HF_HOME', 'unset')}), and {cause}; {way_out}"
    )


def answers() -> bool:
    """Whether the hub answers at all, asked once and briefly."""
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # DNS, proxy, TLS: each has its own class  # noqa: BLE001
        return False
    return True
