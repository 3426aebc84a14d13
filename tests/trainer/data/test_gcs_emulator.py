"""The storage server of the tests, asked by the three clients the trainer uses."""

from __future__ import annotations

import asyncio
import socket
import threading
from urllib.parse import urlsplit

import fsspec
import pytest
import tensorstore as ts
from etils import epath
from gcsfs.retry import HttpError, retry_request
from google.api_core.exceptions import PreconditionFailed
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from tests.gcs_emulator import Gcs
from trainer.data.storage import bucket_client


@pytest.fixture
def client(gcs: Gcs) -> storage.Client:
    return storage.Client(project="test", credentials=AnonymousCredentials())


def test_of_many_writers_that_must_not_find_the_object_exactly_one_wins(gcs: Gcs, client: storage.Client) -> None:
    outcomes: list[str] = []

    def write(text: str) -> None:
        try:
            client.bucket(gcs.bucket).blob("race/marker").upload_from_string(text, if_generation_match=0)
            outcomes.append(text)
        except PreconditionFailed:
            pass

    threads = [threading.Thread(target=write, args=(str(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1
    assert (epath.Path(gcs.url) / "race" / "marker").read_text() == outcomes[0]


def test_of_a_write_whose_client_is_killed_half_way_nothing_is_stored(gcs: Gcs, client: storage.Client) -> None:
    address = urlsplit(gcs.endpoint)
    with socket.create_connection((address.hostname, address.port)) as connection:
        path = f"/upload/storage/v1/b/{gcs.bucket}/o?uploadType=media&name=half"
        request = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf"
        connection.sendall(request.encode())
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""  # it has given up
    assert not client.bucket(gcs.bucket).blob("half").exists()


def test_an_error_that_the_client_raises_is_not_logged_as_a_traceback_too(gcs: Gcs, caplog: pytest.LogCaptureFixture) -> None:
    bucket_client()

    @retry_request
    async def refused() -> None:
        raise HttpError({"code": 400, "message": f"nothing in {gcs.bucket} for you"})

    with pytest.raises(HttpError):
        asyncio.run(refused())
    assert [record.message for record in caplog.records if record.name.startswith("gcsfs")] == []


def test_gcsfs_writes_reads_lists_renames_and_deletes(gcs: Gcs) -> None:
    folder = epath.Path(gcs.url) / "gcsfs folder"
    payload = bytes(range(256)) * 1200
    for name in ("a/one", "a/two", "b/three"):
        (folder / name).write_bytes(payload)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert (folder / "a" / "one").read_bytes() == payload
    (folder / "a" / "one").rename(folder / "a" / "moved")
    assert sorted(path.name for path in (folder / "a").iterdir()) == ["moved", "two"]
    fs = fsspec.filesystem("gcs")
    assert fs.cat_file(f"{gcs.bucket}/gcsfs folder/a/two", start=300, end=310) == payload[300:310]
    with fs.open(f"{gcs.bucket}/gcsfs folder/large", "wb", block_size=2**18) as file:  # a resumable upload in several chunks
        for _ in range(3):
            file.write(payload)
    assert fs.cat_file(f"{gcs.bucket}/gcsfs folder/large") == payload * 3
    folder.rmtree()
    assert not folder.exists()


def test_tensorstore_updates_conditionally_and_deletes_exactly_a_range(gcs: Gcs) -> None:
    store = ts.KvStore.open({"driver": "gcs", "bucket": gcs.bucket, "path": "ts/"}).result()
    for key in ("a", "b", "big", "c"):
        store.write(key, key.encode() * 10).result()
    generation = store.read("a").result().stamp.generation
    store.write("a", b"new", if_equal=generation).result()
    stale = store.write("a", b"stale", if_equal=generation).result()
    assert stale.generation != store.read("a").result().stamp.generation
    assert store.read("a").result().value == b"new"
    store.delete_range(ts.KvStore.KeyRange("b", "c")).result()
    assert store.list().result() == [b"a", b"c"]


def test_the_official_client_pages_batches_and_reads_ranges(gcs: Gcs, client: storage.Client) -> None:
    bucket = client.get_bucket(gcs.bucket)
    for index in range(5):
        bucket.blob(f"page/{index}").upload_from_string(str(index) * 10)
    names = [blob.name for blob in client.list_blobs(bucket, prefix="page/", page_size=2)]
    assert names == [f"page/{index}" for index in range(5)]
    assert bucket.blob("page/3").download_as_bytes(start=2, end=4) == b"333"
    with client.batch():
        for index in range(4):
            bucket.blob(f"page/{index}").delete()
    assert [blob.name for blob in client.list_blobs(bucket, prefix="page/")] == ["page/4"]
