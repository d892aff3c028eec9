"""Commits of models in the local cache of the Hugging Face hub, read without network and without importing the hub's package.

A branch or tag of a model can move, and two machines can have different states of it. So a launch resolves a hub name to the commit in its
cache, and every stage loads that commit. In the cache `models--OWNER--NAME/refs/REVISION` holds a commit, and `snapshots/COMMIT` its files
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ser_core.settings.backbone import BackboneSettings

CACHED_MODEL = "models--"  # prefix of a model's folder
NEWEST = "main"  # the revision that is loaded if none is named
_COMMIT = re.compile(r"[0-9a-f]{40}")


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of the hub's cache, which the same variables choose as in `huggingface_hub.constants`."""
    home = environment.get("HF_HOME") or str(Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    folder = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or str(Path(home) / "hub")
    return Path(os.path.expandvars(Path(folder).expanduser()))


def cached_commit(name: str, revision: str | None) -> str:
    """Return the commit that the cache holds for a revision of a model (None: `main`); "" if it holds none, or not its files."""
    model = cache_folder() / f"{CACHED_MODEL}{name.replace('/', '--')}"
    try:
        commit = (model / "refs" / (revision or NEWEST)).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return commit if _COMMIT.fullmatch(commit) and (model / "snapshots" / commit).is_dir() else ""


def reference(settings: BackboneSettings) -> str:
    """Return the key of `BackboneSettings.commits`: the name of a hub model, with `@REVISION` if one is set."""
    return f"{settings.checkpoint}@{settings.revision}" if settings.revision else str(settings.checkpoint)


def pinned_revision(settings: BackboneSettings) -> str | None:
    """Return the revision to load: the commit found at launch, else the configured one, else None (`main`)."""
    return settings.commits.get(reference(settings)) or settings.revision


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a whole commit, which cannot move."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None
