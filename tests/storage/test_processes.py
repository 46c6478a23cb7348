"""Object stores in several processes: spawned ones work, forked ones are told why not."""

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection

from scripted_server import Fault, Scripted

from dist_decoder.errors import StorageError
from dist_decoder.storage import Storage, open_location


def read_in_child(storage: Storage, answer: Connection) -> None:
    try:
        answer.send(storage.read("one"))
    except StorageError as error:
        answer.send(str(error))


def answer_of_child(method: str, storage: Storage) -> object:
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=read_in_child, args=(storage, theirs))
    child.start()
    try:
        assert ours.poll(60), f"the {method} child hangs"
        return ours.recv()
    finally:
        child.kill()
        child.join()


def test_spawned_processes_open_their_own_client(server: Scripted) -> None:
    server.objects["/bucket/one"] = b"12"
    storage = open_location("s3://bucket")
    assert storage.read("one") == b"12"
    assert answer_of_child("spawn", storage) == b"12"


def test_forked_processes_are_told_instead_of_hanging(server: Scripted) -> None:
    server.objects["/bucket/one"] = b"12"
    storage = open_location("s3://bucket")
    assert storage.read("one") == b"12"
    assert "forked after its parent had used" in str(answer_of_child("fork", storage))


def test_a_fork_before_the_first_use_works(server: Scripted) -> None:
    server.objects["/bucket/one"] = b"12"
    code = (
        "import os; from dist_decoder.storage import open_location\n"
        "storage = open_location('s3://bucket')\n"
        "child = os.fork()\n"
        "assert storage.read('one') == b'12'\n"
        "os._exit(0) if child == 0 else None\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=60, env=dict(os.environ), capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_a_process_that_ends_with_requests_under_way_ends_well(server: Scripted) -> None:
    server.objects["/bucket/one"] = b"12"
    server.script = lambda number, method, path: Fault(delay_s=0.3) if number % 2 else None
    code = (
        "from dist_decoder.storage import open_location\n"
        "storage = open_location('s3://bucket')\n"
        "storage.read('one')\n"
        "asked = [storage.ask_for_ranges('one', [(0, 2)]) for _ in range(50)]\n"
        "asked[0].result()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=60, env=dict(os.environ), capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
