"""Files on disk and objects in S3 behind one interface."""

import fcntl
import hashlib
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom, BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as EndpointError
from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError, S3ValidationError

from infra.errors import FULL, OUTAGE, UserError

TEMPORARY = ".tmp-"  # how the names of half-written local files begin


class StorageUnavailable(UserError):
    """The store cannot be reached or does not answer, after boto3's own retries, or a disk is full: what may pass."""

    exit_code = OUTAGE


class WrongContent(UserError):
    """What arrived is not what was asked for: damaged on its way, or where it is stored."""


class Storage(ABC):
    """A flat store of named byte strings under one root. Names are relative, with "/" between parts.

    A missing name raises FileNotFoundError. What the user can mend (missing bucket, access denied, endpoint out of
    reach, a root that cannot be written) raises UserError. Writes are atomic: a name holds the old bytes or the new.
    A store may be pickled and used in other processes, also after a fork.

    on_retry: called, from any thread, for each request that is sent again; it stays behind when the store is pickled.
    """

    url: str
    on_retry: Callable[[], None] | None = None

    @abstractmethod
    def read(self, name: str) -> bytes: ...

    @abstractmethod
    def write(self, name: str, data: bytes) -> None: ...

    @abstractmethod
    def list(self, prefix: str = "") -> list[str]:
        """Sorted names that start with `prefix`."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes stored under a name."""

    def download(self, name: str, path: Path, sha256: str | None = None) -> int:
        """Copy one object to a local file (atomically); its bytes.

        sha256: of the object, in hexadecimal. Any other content raises WrongContent and never gets to `path`. Such a copy
        is not flushed to disk: after a crash of the machine its reader has to check it, and can.
        """
        with replacing(path, durable=sha256 is None) as file:
            self._fetch(name, file)
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise WrongContent(f"what arrives has not the SHA-256 {sha256} ({self.url}/{name})")
        return size

    @abstractmethod
    def _fetch(self, name: str, file: BinaryIO) -> None:
        """Write one object into an open file."""

    @abstractmethod
    def upload(self, path: Path, name: str) -> None:
        """Copy one local file to an object."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove one object; a name that is not there is no error."""

    def sweep(self) -> None:
        """Remove what killed writers left half written; what others are writing at the moment stays."""


def open_storage(url: str) -> Storage:
    """The store at a local path or an "s3://bucket/prefix" URL (credentials and endpoint from the usual AWS variables)."""
    if not url:
        raise UserError("the data location is empty: give a folder or s3://bucket/prefix")
    if "://" not in url:
        return LocalStorage(Path(url))
    parts = urlsplit(url)
    if parts.scheme != "s3":
        raise UserError(f"{url} is neither a folder nor an s3:// URL: give a local path or s3://bucket/prefix")
    if "@" in parts.netloc:
        raise UserError("an s3:// URL takes no key or password, as it is written down with the run: write s3://bucket/prefix, "
                        "and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")  # fmt: skip
    if not parts.netloc:
        raise UserError(f"{url} names no bucket: write it as s3://bucket/prefix")
    return S3Storage(parts.netloc, parts.path)


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[BufferedRandom]:
    """Open a file for writing that takes the place of `path` only once it is complete, and on disk if it is durable.

    Several processes may do so for the same path at once: the last one wins. UserError if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_temporary(path.parent)
    except OSError as error:
        raise _cannot("write", path, error) from error
    try:
        with file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            _rename(Path(file.name), path)
    except FileNotFoundError:  # what was to be copied here does not exist
        raise
    except OSError as error:
        raise _cannot("write", path, error) from error
    finally:
        Path(file.name).unlink(missing_ok=True)


def _open_temporary(folder: Path) -> BufferedRandom:
    """A new file that its lock tells from those that a killed writer left (see `LocalStorage.sweep`)."""
    while True:
        file = (folder / f"{TEMPORARY}{uuid.uuid4().hex}").open("x+b")
        with suppress(OSError):  # a file system without locks: nothing is swept there
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # swept before it was locked


def _rename(temporary: Path, path: Path) -> None:
    try:
        os.replace(temporary, path)
    except FileNotFoundError as error:  # the folder was deleted meanwhile
        raise _cannot("write", path, error) from error


def _cannot(verb: str, path: Path, error: OSError) -> UserError:
    kind = StorageUnavailable if error.errno in FULL else UserError
    return kind(f"cannot {verb} {path} ({error.strerror}): check the path, its permissions and the free space")


class LocalStorage(Storage):
    """Files below one folder, which is made when the first of them is written."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser()
        self.url = str(self.root)

    def __getstate__(self) -> dict[str, Any]:
        """The same folder for a process that works in another one."""
        return self.__dict__ | {"root": self.root.absolute()}

    @contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        path = self.root / name
        try:
            yield path
        except FileNotFoundError:
            raise
        except NotADirectoryError as error:  # a path below a regular file is as absent as any other
            raise FileNotFoundError(path) from error
        except OSError as error:
            raise _cannot("read", path, error) from error

    def read(self, name: str) -> bytes:
        with self._reading(name) as path:
            return path.read_bytes()

    def write(self, name: str, data: bytes) -> None:
        with replacing(self.root / name) as file:
            file.write(data)

    def list(self, prefix: str = "") -> list[str]:
        names = []
        for folder, _, files in os.walk(self.root / prefix.rpartition("/")[0]):
            relative = Path(folder).relative_to(self.root)
            names += [(relative / file).as_posix() for file in files if not file.startswith(TEMPORARY)]
        return sorted(name for name in names if name.startswith(prefix))

    def size(self, name: str) -> int:
        with self._reading(name) as path:
            return path.stat().st_size

    def _fetch(self, name: str, file: BinaryIO) -> None:
        with self._reading(name) as stored:
            source = stored.open("rb")
        with source:
            shutil.copyfileobj(source, file)

    def upload(self, path: Path, name: str) -> None:
        with open(path, "rb") as source, replacing(self.root / name) as file:
            shutil.copyfileobj(source, file)

    def delete(self, name: str) -> None:
        try:
            (self.root / name).unlink(missing_ok=True)
        except OSError as error:
            raise _cannot("delete", self.root / name, error) from error

    def sweep(self) -> None:
        for path in self.root.rglob(f"{TEMPORARY}*"):
            with suppress(OSError), open(path, "rb") as file:  # it is locked, or gone by now
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)


class S3Storage(Storage):
    """Objects below one prefix of a bucket, at AWS or any S3-compatible endpoint.

    Endpoint, region and credentials come from where boto3 finds them (AWS_ENDPOINT_URL, AWS_REGION,
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, instance roles, ...).

    botocore sends a request again, with exponential backoff and jitter, after 5xx, throttling, a reset or refused
    connection and a timeout; s3transfer does so after a body that breaks off.
    """

    # Checksums only when required: several S3-compatible stores fail boto3's default response validation on ranges.
    _CONFIG = Config(
        connect_timeout=10,
        read_timeout=20,  # seconds without a byte, after which a socket counts as stuck
        # Where 30 % of all requests fail, 8 attempts fail once in 15,000 times.
        retries={"mode": "standard", "total_max_attempts": 8},
        max_pool_connections=32,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # Measured on objects of 64 MB (docs/data.md): larger reads and fewer threads than boto3's own cost the interpreter less.
    _TRANSFER = TransferConfig(
        multipart_threshold=16 * 2**20, multipart_chunksize=16 * 2**20, max_concurrency=16, io_chunksize=2**20
    )

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self._connected: dict[int, tuple[Any, Any]] = {}  # by process: connections and threads do not cross a fork
        self._ranges: dict[str, set[str]] = {}  # of the objects being fetched: those asked for so far

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connected": {}, "_ranges": {}, "on_retry": None}

    @property
    def _client(self) -> Any:
        return self._connect()[0]

    def _connect(self) -> tuple[Any, Any]:
        """(client, transfer manager) of this process. One manager for all transfers, as its threads take longer to start
        than a shard to arrive."""
        if os.getpid() not in self._connected:
            # A session of its own, since making clients from boto3's shared session is not thread-safe.
            client = boto3.session.Session().client("s3", config=self._CONFIG)
            client.meta.events.register("needs-retry.s3", self._note_attempt)
            client.meta.events.register("provide-client-params.s3.GetObject", self._note_range)
            self._connected[os.getpid()] = client, create_transfer_manager(client, self._TRANSFER)
        return self._connected[os.getpid()]

    def _note_attempt(self, attempts: int, **_: Any) -> None:
        """Told by botocore of each answer or its absence, and how often the request was sent by then."""
        if attempts > 1 and self.on_retry:
            self.on_retry()

    def _note_range(self, params: dict[str, Any], **_: Any) -> None:
        """s3transfer tells nobody when it asks again for a body that broke off: it is the range asked for before."""
        asked = self._ranges.setdefault(params["Key"], set())
        if params["Range"] in asked and self.on_retry:
            self.on_retry()
        asked.add(params["Range"])

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def read(self, name: str) -> bytes:
        buffer = BytesIO()
        self._fetch(name, buffer)
        return buffer.getvalue()

    def write(self, name: str, data: bytes) -> None:
        self._send(BytesIO(data), name)

    def list(self, prefix: str = "") -> list[str]:
        with self._explained(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return sorted(key[len(self._key("")) :] for key in keys if not key.endswith("/"))

    def size(self, name: str) -> int:
        with self._explained(name):
            return self._client.head_object(Bucket=self.bucket, Key=self._key(name))["ContentLength"]

    def upload(self, path: Path, name: str) -> None:
        with open(path, "rb") as file:
            self._send(file, name)

    def delete(self, name: str) -> None:
        with self._explained(name):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(name))

    # The transfer manager cuts large objects into parts, sends them at once, and retries each body that breaks off.

    def _fetch(self, name: str, file: BinaryIO) -> None:
        try:
            with self._explained(name):
                self._connect()[1].download(self.bucket, self._key(name), file).result()
        finally:
            self._ranges.pop(self._key(name), None)

    def _send(self, file: BinaryIO, name: str) -> None:
        with self._explained(name):
            self._connect()[1].upload(file, self.bucket, self._key(name)).result()

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn what boto3 raises into FileNotFoundError or into a sentence with the remedy."""
        try:
            yield
        except ClientError as error:
            raise self._explain(error, name) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise UserError(
                f"no S3 credentials for {self.url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from error
        except (EndpointError, HTTPClientError, RetriesExceededError) as error:
            endpoint = self._client.meta.endpoint_url
            raise StorageUnavailable(
                f"the S3 endpoint {endpoint} of {self.url} cannot be reached: check AWS_ENDPOINT_URL and the network"
            ) from error
        except (S3DownloadFailedError, S3ValidationError) as error:
            raise StorageUnavailable(
                f"{self.url}/{name} changed while it was read: start again when nothing writes to it"
            ) from error
        except ParamValidationError as error:
            raise UserError(f"{self.bucket!r} cannot be the name of an S3 bucket: check the URL {self.url}") from error
        except (BotoCoreError, ValueError) as error:  # an impossible endpoint, region or profile
            raise UserError(f"{self.url} cannot be used ({error}): check the URL and the AWS_* variables") from error

    def _explain(self, error: ClientError, name: str) -> Exception:
        code = error.response["Error"].get("Code", "")
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if code == "NoSuchBucket" or (status == 404 and self._bucket_is_missing()):
            return UserError(
                f"the S3 bucket {self.bucket} does not exist: create it, or check {self.url} and AWS_ENDPOINT_URL"
            )
        if status == 404:
            return FileNotFoundError(f"{self.url}/{name}")
        if status in (401, 403):
            return UserError(
                f"access to {self.url} is denied ({code}): check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
            )
        if status in (301, 307):
            return UserError(f"the S3 bucket {self.bucket} is in another region: set AWS_REGION to that of the bucket")
        if status == 429 or status >= 500:
            return StorageUnavailable(
                f"{self.url} keeps answering {status} ({code}): wait until the store is well, and start again"
            )
        return UserError(f"{self.url}/{name} failed with {code or status}: check the URL and the AWS_* variables")

    def _bucket_is_missing(self) -> bool:
        """A 404 to a HEAD request has no body that would say which of the two is missing, bucket or key."""
        try:
            self._client.head_bucket(Bucket=self.bucket)
        except ClientError as error:
            return error.response["ResponseMetadata"]["HTTPStatusCode"] == 404
        return False
