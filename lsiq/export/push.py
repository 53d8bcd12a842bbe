"""Sending an export to the Hugging Face hub: only when asked, with the login of the machine."""

from __future__ import annotations

from pathlib import Path

from lsiq.errors import OutputError
from lsiq.runtime.terminal import say


def push(folder: Path, repository: str) -> str:
    """Upload `folder` to `repository` (owner/name), which is made private if it is new; return its address.

    Raises:
        OutputError: not logged in, no network, or no right to write there.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export by lsiq")
    except Exception as error:  # the hub's client, its HTTP library and the operating system each have their own
        raise OutputError(
            f"export.push={repository}: {type(error).__name__}: {error}; log in with `hf auth login`, then run the "
            f"same command again ({folder} is finished)"
        ) from error
    say(f"pushed to {address}")
    return str(address)
