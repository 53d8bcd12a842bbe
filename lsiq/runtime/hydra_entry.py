"""What all that composes configurations shares: hydra's behaviour, and the functions that files of conf/ call."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf


def _least(most: int, value: Any) -> Any:
    """Return the lesser; what is no number stays as it is, for the settings to refuse in their words."""
    return min(most, value) if isinstance(value, int) else value


# ${least:512,${model.seqlen}}
OmegaConf.register_new_resolver("least", _least, replace=True)


def version_base() -> dict[str, Any]:
    """Return what hydra's entry points are told, so that all releases behave as 1.3 does.

    Without it 1.3 behaves as 1.1 did, and warns; 1.4 has one behaviour, and warns that the word is superfluous.
    """
    from hydra import __version__

    return {"version_base": "1.3"} if __version__.startswith("1.3.") else {}
