"""A small server of the S3 protocol on loopback, with faults to inject.

Knows what the client under test speaks: GET and HEAD with ranges and If-Match, PUT with If-None-Match and If-Match,
DELETE, ListObjectsV2, multipart uploads, path-style addresses. Signatures are not checked. Objects live in memory;
`fault(request)` is asked before each request and may name one of `FAULTS`.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

PAGE = 50
"""Keys in one page of a listing: few, so that every listing of a store takes several."""

FAULTS = ("400", "500", "503", "reset", "truncate", "corrupt", "stall", "slow", "whole", "truncate-answer")


@dataclass(frozen=True)
class Request:
    """What was asked: `method` (GET, PUT, ...), the object's `key`, and the number of the request."""

    method: str
    key: str
    query: str
    number: int


@dataclass
class Bucket:
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    fault: Callable[[Request], str | None] = lambda request: None
    stall_s: float = 2.0
    lock: Any = field(default_factory=threading.RLock)
    numbers: Any = field(default_factory=itertools.count)


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        self.bucket = Bucket()
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body go in two packets: the second would wait 40 ms for an answer
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        key = unquote(url.path).lstrip("/").partition("/")[2]
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length) if length else b""
        bucket = self.server.bucket
        with bucket.lock:
            request = Request(self.command, key, url.query, next(bucket.numbers))
            bucket.requests.append(request)
        fault = bucket.fault(request)
        if fault in ("400", "500", "503"):
            self._answer(int(fault), _error("InternalError"))
        elif fault == "reset":
            self.close_connection = True
            self.connection.close()
        else:
            if fault == "stall":
                time.sleep(bucket.stall_s)
            query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
            with bucket.lock:
                status, headers, data = self._respond(bucket, key, query, body, ranges=fault != "whole")
            if fault == "truncate-answer":  # done, and nobody hears of it
                self.close_connection = True
                self.connection.close()
            else:
                self._answer(status, data, headers, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815 - http.server looks for these

    def _respond(
        self, bucket: Bucket, key: str, query: dict[str, str], body: bytes, *, ranges: bool
    ) -> tuple[int, dict[str, str], bytes]:
        method, found = self.command, bucket.objects.get(key)
        if method == "GET" and "list-type" in query:
            return 200, {}, _listing(bucket.objects, query)
        if method == "POST" and "uploads" in query:
            bucket.uploads[upload := f"upload-{len(bucket.uploads)}"] = {}
            return (
                200,
                {},
                f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>".encode(),
            )
        if method == "PUT" and "partNumber" in query:
            bucket.uploads[query["uploadId"]][int(query["partNumber"])] = body
            return 200, {"ETag": etag(body)}, b""
        if method == "POST" and "uploadId" in query:
            body = b"".join(part for _, part in sorted(bucket.uploads.pop(query["uploadId"]).items()))
            bucket.objects[key] = body
            answer = f"<CompleteMultipartUploadResult><ETag>{escape(etag(body))}</ETag></CompleteMultipartUploadResult>"
            return 200, {}, answer.encode()
        if method == "POST" and "delete" in query:
            names = re.findall(r"<Key>(.*?)</Key>", body.decode())
            for name in names:
                bucket.objects.pop(unescape(name), None)
            deleted = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            return 200, {}, f"<DeleteResult>{deleted}</DeleteResult>".encode()
        if method == "DELETE":
            bucket.uploads.pop(query.get("uploadId", ""), None)
            if "uploadId" not in query:
                bucket.objects.pop(key, None)
            return 204, {}, b""
        if method == "PUT":
            wanted = self.headers.get("If-Match")
            if (self.headers.get("If-None-Match") == "*" and found is not None) or (
                wanted and (found is None or wanted.strip('"') != etag(found).strip('"'))
            ):
                return 412, {}, _error("PreconditionFailed")
            bucket.objects[key] = body
            return 200, {"ETag": etag(body)}, b""
        if found is None:
            return 404, {}, _error("NoSuchKey")
        wanted = self.headers.get("If-Match")
        if wanted and wanted.strip('"') != etag(found).strip('"'):
            return 412, {}, _error("PreconditionFailed")
        headers = {"ETag": etag(found), "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"}
        span = self.headers.get("Range")
        if span is None or not ranges:
            return 200, headers, found
        first, _, last = span.removeprefix("bytes=").partition("-")
        end = min(int(last), len(found) - 1)
        headers["Content-Range"] = f"bytes {first}-{end}/{len(found)}"
        return 206, headers, found[int(first) : end + 1]

    def _answer(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, fault: str | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "corrupt" and data:
            data = bytes([data[0] ^ 1]) + data[1:]
        if fault == "truncate":
            data = data[: len(data) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            if fault == "slow":
                self.wfile.write(data[: len(data) // 2])
                data = data[len(data) // 2 :]
                time.sleep(self.server.bucket.stall_s)
            self.wfile.write(data)


def _error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected or asked for</Message></Error>".encode()


def _listing(objects: dict[str, bytes], query: dict[str, str]) -> bytes:
    after = query.get("continuation-token", "")
    keys = sorted(key for key in objects if key.startswith(query.get("prefix", "")) and key > after)
    page, more = keys[:PAGE], len(keys) > PAGE
    items = "".join(
        f"<Contents><Key>{escape(key)}</Key><LastModified>2025-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>{escape(etag(objects[key]))}</ETag><Size>{len(objects[key])}</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
        for key in page
    )
    token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
    return (
        "<?xml version='1.0' encoding='UTF-8'?><ListBucketResult>"
        f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}<KeyCount>{len(page)}</KeyCount>{items}</ListBucketResult>"
    ).encode()
