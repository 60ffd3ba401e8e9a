"""The objects below one URL: listed, read in ranges, written whole, each request tried again where that can help.

Retries: 5xx, 408, 429, timeouts, dropped connections and cut-off responses; exponential backoff with full jitter
(`uniform(0, min(10 s, 0.2 s * 2^n))`), a bounded number of attempts. The client's own retries are off: one policy.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vla.stores.errors import MachineError, StoreError, missing_extra
from vla.stores.remote.options import RemoteOptions

T = TypeVar("T")
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE")
_CONTAINER = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
_LASTING = re.compile(r"\b(?:status|status code:?) (?!408|429)(?:3|4)\d\d\b", re.IGNORECASE)
"""The client says "Client error with status 400 Bad Request": no second attempt mends a request that is wrong."""


@dataclass(frozen=True)
class ObjectInfo:
    """Size in bytes and entity tag of an object, as listed."""

    size: int
    etag: str


class ReplacedError(StoreError):
    """An object is no longer the one that was listed: its entity tag differs, or it is gone."""


class _UnsupportedError(MachineError):
    """The server cannot do what was asked for."""


class TakenError(StoreError):
    """An object that was to be created exists."""


class Bucket:
    """The objects below `url`. Safe for threads.

    Raises `MachineError` where the client library is missing, the object store cannot be reached, or it refuses;
    the message names the URL.
    """

    def __init__(self, url: str, options: RemoteOptions) -> None:
        try:
            import obstore
            from obstore import exceptions
            from obstore.store import from_url
        except ImportError as error:
            raise MachineError(f"{url} needs the package obstore ({error})", fix=missing_extra("remote")) from None
        self.url, self.options = url.rstrip("/"), options
        self._obstore, self._errors = obstore, exceptions
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        client: dict[str, Any] = {"timeout": f"{int(1000 * options.timeout_s)}ms", "connect_timeout": "5s"}
        if endpoint.startswith("http://"):  # asked for by name: a server of one's own
            client["allow_http"] = True
        try:
            opened: Any = from_url
            self._store = opened(self.url, client_options=client, retry_config={"max_retries": 0})
        except (exceptions.BaseError, ValueError) as error:
            raise self._explained(self.url, error) from None

    def objects(self) -> dict[str, ObjectInfo]:
        """Return `{path below the URL: size and tag}` of every object."""

        def listed() -> dict[str, ObjectInfo]:
            pages = self._obstore.list(self._store)
            return {item["path"]: ObjectInfo(item["size"], item["e_tag"] or "") for page in pages for item in page}

        return self._trying("", listed)

    def get(self, path: str, *, span: tuple[int, int] | None = None, etag: str | None = None) -> bytes:
        """Return an object, or its bytes `span` = [start, end).

        Raises `ReplacedError` where it is missing or its tag is not `etag`.
        """

        def got() -> bytes:
            wanted: dict[str, Any] = {"if_match": etag} if etag else {}
            if span is not None:
                wanted["range"] = span
            # The client raises where less comes than was announced, or another range than was asked for.
            return bytes(self._obstore.get(self._store, path, options=wanted).bytes())

        return self._trying(path, got)

    def put(self, path: str, data: bytes | Path, mode: Any = "overwrite") -> str:
        """Write an object whole; return its tag. Large files go in parts.

        `mode`: "overwrite", "create" (raises `TakenError` where it exists) or `{"e_tag": tag}` (raises `ReplacedError`
        where it is no longer that one).
        """

        def put() -> str:
            return self._obstore.put(self._store, path, data, mode=mode)["e_tag"] or ""

        return self._trying(path, put)

    def create(self, path: str, data: bytes) -> str:
        """Write a small object that must not exist; return its tag. Raises `TakenError` where another one does.

        A conditional put (`If-None-Match: *`). Where `AWS_CONDITIONAL_PUT=disabled` says that the server knows none,
        a look before writing has to do: then two writers at the same moment are kept apart by the lease alone.
        """
        try:
            return self.put(path, data, "create")
        except TakenError:
            # An attempt whose answer got lost may have made it.
            if self.get(path) != data:
                raise
            return self.head(path).etag
        except _UnsupportedError:
            if path in self.objects():
                raise TakenError(f"{self.url}/{path} exists") from None
            return self.put(path, data)

    def replace(self, path: str, data: bytes, etag: str) -> str:
        """Write a small object in the place of the one with this tag; return the new tag. Raises `ReplacedError`."""
        try:
            return self.put(path, data, {"e_tag": etag})
        except _UnsupportedError:
            if self.head(path).etag != etag:
                raise ReplacedError(f"{self.url}/{path} was replaced by another object") from None
            return self.put(path, data)

    def head(self, path: str) -> ObjectInfo:
        """Return size and tag of one object. Raises `ReplacedError` where there is none."""
        found = self._trying(path, lambda: self._obstore.head(self._store, path))
        return ObjectInfo(found["size"], found["e_tag"] or "")

    def delete(self, paths: list[str]) -> None:
        """Delete objects that are there."""
        if paths:
            self._trying("", lambda: self._obstore.delete(self._store, paths))

    def _trying(self, path: str, action: Callable[[], T]) -> T:
        where, errors = f"{self.url}/{path}".rstrip("/"), self._errors
        for attempt in range(self.options.attempts):
            if attempt:
                time.sleep(random.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt)))
            try:
                return action()
            except errors.AlreadyExistsError:
                raise TakenError(f"{where} exists") from None
            except (FileNotFoundError, errors.PreconditionError) as error:
                what = "does not exist" if isinstance(error, FileNotFoundError) else "was replaced by another object"
                raise ReplacedError(f"{where} {what}", fix=f"vla verify {self.url}") from None
            except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
                raise self._explained(where, error) from None
            except (errors.NotSupportedError, NotImplementedError) as error:
                raise _UnsupportedError(f"{where}: {_one_line(error)}") from None
            except (errors.GenericError, ConnectionError, TimeoutError) as error:
                if attempt + 1 == self.options.attempts or _LASTING.search(str(error)):
                    raise self._explained(where, error, attempt + 1) from None
            except (errors.BaseError, OSError) as error:
                raise self._explained(where, error) from None
        raise AssertionError("the last attempt returns or raises")

    def _explained(self, where: str, error: Exception, attempts: int = 1) -> MachineError:
        tries = f" ({attempts} attempts)" if attempts > 1 else ""
        fix = ""
        if self.url.startswith("s3") and not any(os.environ.get(name) for name in (*_CREDENTIALS, *_CONTAINER)):
            fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL for a server of your own)"
        return MachineError(f"{where}: {_one_line(error)}{tries}", fix=fix)


def _one_line(error: Exception) -> str:
    """Return the cause in a client's error, whose text goes on with a debug dump in further lines."""
    text = " ".join(str(error).split("\n\nDebug source:")[0].split())
    code = re.search(r"<Code>(\w+)</Code>", text)  # S3 answers with an XML document
    return (f"{text.partition('<')[0].rstrip(' :')} ({code[1]})" if code else text)[:300]
