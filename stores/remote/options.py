"""What can be set about stores on object stores, and what counts as one. Imports no client library."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

from vla.stores.errors import UsageError
from vla.stores.settings import Settings
from vla.stores.user_given import UserGiven

SCHEMES = ("s3://", "s3a://", "gs://", "az://", "abfs://", "abfss://")
_LIKE_A_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class RemoteOptions(Settings):
    """How a remote store is reached and cached.

    `cache`: folder of the local cache (None: `$VLA_CACHE`, else `$XDG_CACHE_HOME/vla`, else `~/.cache/vla`).
    `limit_gb`: GiB of cached feature blocks over all stores in that folder, above which the least recently used shards
    go. `block_mb`: MiB fetched at least, by one ranged GET. `threads`: requests in flight. `timeout_s`: of one
    request. `attempts`: tries of a request that fails for a passing reason. `lease_s`: after how long a writer that
    was never heard of again counts as gone.
    """

    cache: Annotated[str | None, UserGiven()] = None
    limit_gb: float = Field(50.0, gt=0)
    block_mb: float = Field(4.0, gt=0)
    threads: int = Field(8, ge=1, le=64)
    timeout_s: float = Field(60.0, gt=0)
    attempts: int = Field(6, ge=1)
    lease_s: float = Field(60.0, gt=0)

    @property
    def folder(self) -> Path:
        """The cache folder."""
        if self.cache:
            return Path(self.cache).expanduser()
        own, shared = os.environ.get("VLA_CACHE"), os.environ.get("XDG_CACHE_HOME")
        return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "vla"

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return max(1, int(self.block_mb * 2**20))

    @property
    def limit_bytes(self) -> int:
        """Bytes of feature blocks that the cache may hold."""
        return int(self.limit_gb * 2**30)


def is_url(path: object) -> bool:
    """Whether `path` names a store on an object store."""
    return str(path).startswith(SCHEMES)


def require_folder(path: Path | str) -> Path:
    """Return `path` where it may be a folder's. Raises `UsageError` for URLs, also once a `Path` has shortened them."""
    if _LIKE_A_URL.match(str(path)):
        raise UsageError(
            f"{str(path).replace(':/', '://', 1).replace(':///', '://')} is a URL",
            expected="a folder here; featurize, verify, inspect, train-head, evaluate and convert's input take URLs "
            f"that begin with {', '.join(SCHEMES)}",
        )
    return Path(path)
