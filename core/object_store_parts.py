"""An object of an S3 server that is put together from parts, several of them sent side by side.

In: where the object is to be, its size, and how a part gets there, from a local file or another object. Out: the object, whole
and at once, or none: an upload that fails is aborted. A process that is killed in the middle leaves parts behind that only the
bucket's lifecycle rule removes (AbortIncompleteMultipartUpload). Cost: a request for each part, and two more.
"""

import contextlib
import uuid
from collections.abc import Callable
from typing import Any

from core.object_store_calls import PROBE_PATIENCE_S, at_once, code_of, persistently

MOST_PARTS = 10_000  # S3's limit

Upload = dict[str, Any]  # Bucket, Key, UploadId and PartNumber of a part
Send = Callable[[Any, Upload, int, int], dict[str, Any]]  # (client, upload, start, stop) -> ETag, and checksums if any


def in_parts(bucket: str, key: str, size: int, part_bytes: int, send: Send) -> None:
    """Make the object of bytes [0, size) from parts of about `part_bytes`: a call of `send` each, repeated if it tears."""
    where = f"s3://{bucket}/{key}"
    part_bytes = max(part_bytes, -(-size // MOST_PARTS))
    mine = uuid.uuid4().hex
    begun = persistently(
        lambda c: c.create_multipart_upload(Bucket=bucket, Key=key, Metadata={"stepwell-upload": mine}), where
    )
    upload = {"Bucket": bucket, "Key": key, "UploadId": begun["UploadId"]}

    def part(start: int) -> dict[str, Any]:
        number, stop = start // part_bytes + 1, min(size, start + part_bytes)
        sent = persistently(lambda c: send(c, {**upload, "PartNumber": number}, start, stop), where)
        return {"PartNumber": number, **{k: v for k, v in sent.items() if k == "ETag" or k.startswith("Checksum")}}

    try:
        parts = at_once(part, range(0, size, part_bytes))
        persistently(lambda c: _complete(c, upload, parts, mine), where)
    except BaseException:
        with contextlib.suppress(Exception):  # the fault that led here is the one to tell
            persistently(lambda c: c.abort_multipart_upload(**upload), where, PROBE_PATIENCE_S)
        raise


def _complete(client: Any, upload: Upload, parts: list[dict[str, Any]], mine: str) -> None:
    try:
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    except client.exceptions.ClientError as e:
        # An earlier try may have succeeded and only its answer been lost.
        if code_of(e) != "NoSuchUpload":
            raise
        there = client.head_object(Bucket=upload["Bucket"], Key=upload["Key"])
        if there["Metadata"].get("stepwell-upload") != mine:
            raise
