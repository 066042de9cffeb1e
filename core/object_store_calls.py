"""Calls to an S3 server that end in an answer or in one line: the client, what is tried again and for how long, what errors mean.

One retry layer, ours: botocore's own retries end where the body begins, and most torn transfers are torn in the body. A call is
repeated whole, from the request to the last byte and its checksum, until it succeeds or its patience is over. What cannot pass by
itself (credentials, a bucket that is not there) raises ConfigError at once.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from core.errors import ConfigError, StageError

PATIENCE_S = 120.0  # from a call's first fault to its last try; a store that throttles recovers in seconds
PROBE_PATIENCE_S = 15.0  # before any work, where a wrong endpoint should be named soon, and after a failure
FIRST_WAIT_S = 0.1  # at most; doubled with each try up to LONGEST_WAIT_S, and drawn evenly from zero (full jitter)
LONGEST_WAIT_S = 10.0
CONNECT_S, READ_S = 10.0, 60.0  # without a connection, without a byte
CONNECTIONS = 16
TRANSFERS = 4  # calls of one `at_once` side by side

PASSING_STATUS = {429, 500, 502, 503, 504}
PASSING_CODES = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestThrottled",
    "RequestTimeout",
    "InternalError",
    "ServiceUnavailable",
    "OperationAborted",
    "ConditionalRequestConflict",  # two conditional writes at once: the next try learns which came first
    "XAmzContentSHA256Mismatch",  # what arrived is not what was sent
    "BadDigest",
    "IncompleteBody",
}
ABSENT_CODES = {"NoSuchKey", "NotFound", "404"}
UNMATCHED_CODES = {"PreconditionFailed", "412"}
CHECK_CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile in ~/.aws"
NO_CREDENTIALS = f"root: {{where}}: got no credentials, expected an access key and its secret; {CHECK_CREDENTIALS}"
REFUSALS = {  # code -> (got, expected; next step)
    "SignatureDoesNotMatch": ("a wrong secret", f"the secret of this access key; {CHECK_CREDENTIALS}"),
    "InvalidAccessKeyId": ("an access key that the store does not know", f"a key of this store; {CHECK_CREDENTIALS}"),
    "InvalidToken": ("a session token that the store does not accept", "a valid AWS_SESSION_TOKEN; log in again"),
    "ExpiredToken": ("an expired session token", "a valid AWS_SESSION_TOKEN; log in again"),
    "NoSuchBucket": ("no such bucket", "an existing bucket; create it, or correct `root`"),
    "InvalidBucketName": ("an invalid bucket name", "s3://bucket/folder; correct `root`"),
    "AccessDenied": ("no permission", "the right to list, read, write and delete; ask the bucket's owner"),
    "403": ("no permission, or wrong credentials", f"the right to list, read, write and delete; {CHECK_CREDENTIALS}"),
    "PermanentRedirect": ("a bucket of another region", "its own region; set AWS_DEFAULT_REGION"),
    "301": ("a bucket of another region", "its own region; set AWS_DEFAULT_REGION"),
    "AuthorizationHeaderMalformed": ("a signature for another region", "the bucket's; set AWS_DEFAULT_REGION"),
    "RequestTimeTooSkewed": ("a signature of another time", "a clock within 15 minutes; set this machine's clock"),
}
FSSPEC_SETTINGS = {"key", "secret", "token", "endpoint_url", "profile", "client_kwargs", "config_kwargs"}
# Settings of s3fs that only tune it, and so mean nothing here.
FSSPEC_TUNING = {
    "use_listings_cache",
    "default_block_size",
    "default_fill_cache",
    "default_cache_type",
    "max_concurrency",
}

log = logging.getLogger("stepwell")
T = TypeVar("T")


class TornError(Exception):
    """An answer that is not whole: shorter than it said, or an error inside a success."""


_lock = threading.Lock()
_clients: dict[
    Any, Any
] = {}  # settings -> client; one a process: a forked child must not share its parent's connections


def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    _clients.clear()


os.register_at_fork(after_in_child=_forget)


def connect() -> Any:
    """The process's botocore client for the credentials and endpoint that the environment, ~/.aws and fsspec's own
    configuration (`FSSPEC_S3_...`, ~/.config/fsspec) name now."""
    settings = _fsspec_settings()
    named = sorted((n, v) for n, v in os.environ.items() if n.startswith("AWS_"))
    with _lock:
        key = (tuple(named), repr(sorted(settings.items())))
        if key not in _clients:
            _clients[key] = _client(settings)
        return _clients[key]


def _fsspec_settings() -> dict[str, Any]:
    from_environment: dict[str, Any] = {}
    fsspec.config.set_conf_env(from_environment)  # read again: the import may have been before the variable
    settings = {**fsspec.config.conf.get("s3", {}), **from_environment.get("s3", {})}
    unknown = sorted(set(settings) - FSSPEC_SETTINGS - FSSPEC_TUNING)
    if unknown:
        raise ConfigError(
            f"root: s3://: got fsspec's s3 setting {unknown[0]!r}, which means nothing here, expected some of "
            f"{', '.join(sorted(FSSPEC_SETTINGS))}; remove it or use ~/.aws/config"
        )
    return {name: value for name, value in settings.items() if name in FSSPEC_SETTINGS}


def _client(settings: dict[str, Any]) -> Any:
    try:
        import botocore.config
        import botocore.session
    except ImportError as e:
        raise ConfigError(
            "root: s3://: got no package botocore, expected what s3fs brings; pip install 'stepwell[s3]'"
        ) from e
    from botocore.exceptions import BotoCoreError, PartialCredentialsError

    config = {
        "connect_timeout": CONNECT_S,
        "read_timeout": READ_S,
        "max_pool_connections": CONNECTIONS,
        "retries": {"total_max_attempts": 1},
        **settings.get("config_kwargs", {}),
    }
    given = {
        "aws_access_key_id": settings.get("key"),
        "aws_secret_access_key": settings.get("secret"),
        "aws_session_token": settings.get("token"),
        "endpoint_url": settings.get("endpoint_url"),
        **settings.get("client_kwargs", {}),
    }
    try:
        session = botocore.session.Session(profile=settings.get("profile"))
        return session.create_client("s3", config=botocore.config.Config(**config), **given)
    except PartialCredentialsError:
        raise ConfigError(NO_CREDENTIALS.format(where="s3://")) from None
    except (BotoCoreError, TypeError, ValueError) as e:
        raise ConfigError(
            f"root: cannot set up a client for s3://, got {type(e).__name__}, expected usable settings; check AWS_ENDPOINT_URL, "
            "~/.aws/config and fsspec's settings"
        ) from None  # its message may quote a setting


def persistently(call: Callable[[Any], T], where: str, patience_s: float | None = None) -> T:
    """`call(client)`, repeated while its faults are passing ones, for at most about `patience_s` (PATIENCE_S). A key that is
    not there is FileNotFoundError, an unmet condition botocore's ClientError, the rest ConfigError or StageError."""
    tries, began = 0, 0.0
    patience_s = PATIENCE_S if patience_s is None else patience_s
    draw = random.SystemRandom()  # for waiting only: workers that were throttled together must not come back together
    while True:
        client = connect()
        try:
            return call(client)
        except Exception as e:
            tries += 1
            began = began or time.monotonic()
            waited = time.monotonic() - began
            if not _is_passing(e):
                final = _final(e, where, client)
                if final is e:
                    raise
                raise final from (None if isinstance(final, ConfigError) else e)
            wait_s = draw.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**tries))
            if waited + wait_s > patience_s:
                raise _given_up(e, where, client, tries, waited) from e
            log.debug("%s: %s, try %d", where, _said(e), tries + 1)
        time.sleep(wait_s)


def at_once(work: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """`work` on each item, TRANSFERS of them side by side; results in order, the first failure raised."""
    if len(items) <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(TRANSFERS) as pool:
        try:
            return list(pool.map(work, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what has begun ends, the rest does not begin
            raise


def code_of(error: BaseException) -> str:
    """The store's own word for an error, such as NoSuchKey; empty if it is none of the store's."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def is_unmatched(error: BaseException) -> bool:
    return code_of(error) in UNMATCHED_CODES


def _status_of(error: BaseException) -> int:
    response = getattr(error, "response", None)
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(response, dict) else 0


def _is_passing(error: Exception) -> bool:
    import botocore.exceptions as known
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError  # as botocore lets it through when an error's own body is torn

    if isinstance(error, known.ClientError):
        return code_of(error) in PASSING_CODES or _status_of(error) in PASSING_STATUS
    if isinstance(error, known.SSLError):
        return "CERTIFICATE" not in str(error).upper()
    torn = (
        known.ConnectionError,
        known.HTTPClientError,
        known.IncompleteReadError,
        known.FlexibleChecksumError,
        ResponseParserError,
    )
    return isinstance(error, (*torn, HTTPError, TornError, ConnectionError))


def _final(error: Exception, where: str, client: Any) -> Exception:
    """What a fault that will not pass becomes."""
    import botocore.exceptions as known

    code = code_of(error)
    if code in ABSENT_CODES:
        return FileNotFoundError(where)
    if code in REFUSALS:
        got, expected = REFUSALS[code]
        return ConfigError(f"root: {where}: got {got} ({code}), expected {expected}")
    if isinstance(error, (known.NoCredentialsError, known.PartialCredentialsError, known.CredentialRetrievalError)):
        return ConfigError(
            f"root: {where}: got no credentials, expected an access key and its secret; {CHECK_CREDENTIALS}"
        )
    if isinstance(error, (known.ParamValidationError, known.InvalidDNSNameError)):
        return ConfigError(
            f"root: {where}: got a name that S3 does not allow, expected s3://bucket/folder; correct `root`"
        )
    if isinstance(error, known.ClientError) and not is_unmatched(error) and code != "NoSuchUpload":
        return StageError(f"root: {where}: the store answered {_said(error)}; mend the cause, then run again")
    if isinstance(error, known.BotoCoreError):
        return ConfigError(
            f"root: {where}: got {type(error).__name__} from {endpoint_of(client)}; check AWS_ENDPOINT_URL"
        )
    return error


def _given_up(error: Exception, where: str, client: Any, tries: int, waited_s: float) -> Exception:
    """What a fault becomes that should pass and did not."""
    from botocore.exceptions import ConnectionError as Unreached

    tried = f"{tries} tries in {waited_s:.0f} s"
    if isinstance(error, Unreached):
        return StageError(
            f"root: {where}: got no connection to {endpoint_of(client)} ({tried}), expected an S3 server; "
            "check AWS_ENDPOINT_URL and that the server is up; what is committed stays"
        )
    return StageError(
        f"root: {where}: no whole answer from {endpoint_of(client)} ({tried}), got {_said(error)}; what is committed "
        "stays, run again when the store has recovered"
    )


def endpoint_of(client: Any) -> str:
    """The server's URL without what may be a password in it."""
    parts = urlsplit(client.meta.endpoint_url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _said(error: Exception) -> str:
    """An error in a few words that hold no part of a request: botocore's messages may quote headers."""
    code, status = code_of(error), _status_of(error)
    if code:
        return f"{status} {code}" if str(status) != code else code
    return str(error) if isinstance(error, TornError) else type(error).__name__
