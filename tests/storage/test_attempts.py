"""Requests are made again, twice or not at all, as the policy says."""

import logging
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from scripted_server import Fault, Scripted

from dist_decoder.config.storage import StorageConfig
from dist_decoder.errors import StorageError
from dist_decoder.storage import Storage, open_location

DATA = np.random.Generator(np.random.PCG64(3)).bytes(3_000_000)
QUICK = {"backoff_s": 0.01, "max_backoff_s": 0.02, "hedge": "off"}


def opened(server: Scripted, **policy: object) -> Storage:
    server.objects["/bucket/pre/one"] = DATA
    return open_location("s3://bucket/pre", StorageConfig(**{**QUICK, **policy}))


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503, code="SlowDown"),
        Fault(status=500),
        Fault(status=429),
        Fault(cut_after=1000),
        Fault(cut_after=0),
    ],
)
def test_passing_faults_are_asked_again_and_counted(server: Scripted, fault: Fault) -> None:
    storage = opened(server)
    server.script = lambda number, method, path: fault if number < 3 else None
    assert storage.read_range("one", 5, 200_000) == DATA[5:200_005]
    counters = storage.counters()
    assert (counters.requests, counters.retries, counters.bytes_read) == (4, 3, 200_000)
    server.script = lambda number, method, path: fault if number < 5 else None
    assert storage.read("one") == DATA


def test_ranges_come_in_the_order_asked_for_and_together(server: Scripted) -> None:
    storage = opened(server, max_in_flight=5)
    server.script = lambda number, method, path: Fault(delay_s=0.2 if number % 2 else 0.05)
    ranges = [(900 - 100 * number, 50 + number) for number in range(9)] + [(7, 0)]
    found = storage.read_ranges("one", ranges)
    assert found == [DATA[offset : offset + size] for offset, size in ranges]
    assert 4 <= server.most_in_flight <= 5


def test_max_in_flight_of_one_is_one_after_the_other(server: Scripted) -> None:
    storage = opened(server, max_in_flight=1)
    storage.read_ranges("one", [(0, 10)] * 6)
    assert server.most_in_flight == 1


def test_large_reads_are_divided_into_parts(server: Scripted) -> None:
    storage = opened(server, part_mb=0.25)
    assert storage.read_range("one", 11, 2_000_000) == DATA[11:2_000_011]
    assert len(server.requests) == -(-2_000_000 // (1 << 18))
    assert storage.read("one") == DATA
    assert b"".join(storage.stream("one", 3, 1_500_000)) == DATA[3:1_500_003]
    whole = opened(server, part_mb=8)
    server.requests.clear()
    whole.read_range("one", 11, 2_000_000)
    assert len(server.requests) == 1


def test_retries_are_limited_in_number(server: Scripted) -> None:
    storage = opened(server, retries=4)
    server.script = lambda number, method, path: Fault(status=503)
    with pytest.raises(StorageError, match=r"s3://bucket/pre/one cannot be accessed.*after 4 ret"):
        storage.read_range("one", 0, 10)
    assert len(server.requests) == 5


def test_the_deadline_holds_for_stalls_and_for_refusals(server: Scripted) -> None:
    storage = opened(server, deadline_s=0.7, retries=1000)
    for fault in (Fault(delay_s=5.0), Fault(status=503), Fault(cut_after=3)):
        server.script = lambda number, method, path, fault=fault: fault
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"storage\.deadline_s is 0\.7"):
            storage.read_range("one", 0, 1000)
        assert time.monotonic() - started < 2.0


def test_an_attempt_that_hangs_is_given_up_and_made_again(server: Scripted) -> None:
    storage = opened(server, attempt_s=0.3)
    server.script = lambda number, method, path: Fault(delay_s=20.0) if number == 0 else None
    started = time.monotonic()
    assert storage.read_range("one", 0, 10) == DATA[:10]
    assert 0.3 <= time.monotonic() - started < 3.0
    assert storage.counters().retries == 1


def test_pauses_grow_to_their_limit(server: Scripted) -> None:
    storage = opened(server, backoff_s=0.1, max_backoff_s=0.2, retries=4)
    server.script = lambda number, method, path: Fault(status=503)
    with pytest.raises(StorageError):
        storage.read_range("one", 0, 10)
    pauses = np.diff([at for _, _, at in server.requests])
    # With jitter a pause is half to all of its length.
    for pause, most in zip(pauses, (0.1, 0.2, 0.2, 0.2), strict=True):
        assert most / 2 <= pause < most + 0.15


@pytest.mark.parametrize(("hedge", "hedges"), [("fixed", 1), ("adaptive", 1), ("off", 0)])
def test_a_late_read_is_sent_twice_and_the_first_answer_wins(
    server: Scripted, hedge: str, hedges: int
) -> None:
    storage = opened(server, hedge=hedge, hedge_after_s=0.15)
    server.script = lambda number, method, path: Fault(delay_s=1.0) if number == 0 else None
    started = time.monotonic()
    assert storage.read_range("one", 0, 10) == DATA[:10]
    took = time.monotonic() - started
    counters = storage.counters()
    assert (counters.hedges, counters.hedge_wins) == (hedges, hedges)
    assert took < 0.9 if hedges else took >= 1.0
    assert counters.bytes_read == 10


@pytest.mark.parametrize(("percentile", "hedged"), [(50.0, True), (99.0, False)])
def test_adaptive_hedges_learn_what_late_means(
    server: Scripted, percentile: float, hedged: bool
) -> None:
    storage = opened(server, hedge="adaptive", hedge_after_s=5.0, hedge_percentile=percentile)
    # Two in ten take 0.3 s: late by the median of the others, usual by the 99th percentile.
    server.script = lambda number, method, path: Fault(delay_s=0.3 if number % 10 >= 8 else 0.0)
    for _ in range(30):
        storage.read_range("one", 0, 10)
    before = storage.counters().hedges
    server.script = lambda number, method, path: Fault(delay_s=0.3)
    storage.read_range("one", 0, 10)
    assert (storage.counters().hedges > before) == hedged


def test_hedges_are_limited_in_share(server: Scripted) -> None:
    counts = []
    for limit in (0.0, 0.05):
        storage = opened(server, hedge="fixed", hedge_after_s=0.02, hedge_limit=limit)
        server.script = lambda number, method, path: Fault(delay_s=0.06)
        storage.read_ranges("one", [(0, 10)] * 40)
        counts.append(storage.counters().hedges)
    assert counts[0] == 0
    assert 5 <= counts[1] <= 8


def test_writes_are_never_hedged(server: Scripted) -> None:
    storage = opened(server, hedge="fixed", hedge_after_s=0.02)
    server.script = lambda number, method, path: Fault(delay_s=0.1)
    storage.write("two", b"12")
    assert [method for method, _, _ in server.requests] == ["PUT"]
    assert server.objects["/bucket/pre/two"] == b"12"


def test_uploads_are_asked_again(server: Scripted) -> None:
    storage = opened(server)
    server.script = lambda number, method, path: Fault(status=503) if number < 2 else None
    storage.write("two", b"12")
    assert server.objects["/bucket/pre/two"] == b"12"


def test_what_waits_for_its_upload_has_no_name(
    server: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So that a process that is killed leaves nothing in the temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage = opened(server)
    with storage.create("two") as file:
        file.write(b"123456")
        file.flush()
        assert list(tmp_path.iterdir()) == []
        file.seek(2)
    assert server.objects["/bucket/pre/two"] == b"123456"
    assert storage.counters().bytes_written == 6


def test_an_object_that_is_replaced_in_between_is_not_mixed(server: Scripted) -> None:
    storage = opened(server, part_mb=1)
    server.script = lambda number, method, path: Fault(etag=str(number))
    with pytest.raises(StorageError, match=r"pre/one was replaced while it was being read"):
        storage.read_range("one", 0, 2_500_000)
    with pytest.raises(StorageError, match="was replaced"):
        list(storage.stream("one", 0, 2_500_000))


def test_a_server_without_ranges_is_told_at_once(server: Scripted) -> None:
    storage = opened(server)
    server.script = lambda number, method, path: Fault(ignore_range=True)
    with pytest.raises(StorageError, match="use a server that knows ranges"):
        storage.read_range("one", 10, 20)
    assert len(server.requests) == 1


def test_a_range_behind_the_end_is_a_truncated_object(server: Scripted) -> None:
    storage = opened(server)
    with pytest.raises(StorageError, match=r"of 3000000 bytes\) at byte 2999990: 10 of 20 bytes"):
        storage.read_range("one", len(DATA) - 10, 20)
    with pytest.raises(StorageError, match="the object ends before the range"):
        storage.read_range("one", len(DATA) + 10, 20)
    assert len(server.requests) == 2


def test_waiting_is_said_once(server: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    storage = opened(server)
    server.script = lambda number, method, path: Fault(status=503) if number < 8 else None
    with caplog.at_level(logging.WARNING):
        storage.read_range("one", 0, 10)
    assert len(caplog.records) == 1
    assert "s3://bucket/pre/one" in caplog.text
    assert "asking again" in caplog.text


def test_latencies_are_measured(server: Scripted) -> None:
    storage = opened(server)
    server.script = lambda number, method, path: Fault(delay_s=0.25 if number == 19 else 0.05)
    for _ in range(20):
        storage.read_range("one", 0, 10)
    counters = storage.counters()
    assert 0.05 <= counters.latency_p50_s < 0.2
    assert counters.latency_p50_s <= counters.latency_p90_s <= counters.latency_p99_s
    assert 0.25 <= counters.latency_max_s < 1.0
