"""Both executors do the same work; the Ray one also survives the loss of its workers. One Ray serves all tests."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import ray
import torch
from npeff.execution.executor import ATTEMPTS, ExecutorError, ItemsFailedError, WorkerLostError, WorkerSpec
from npeff.execution.ray import actor as ray_actor
from npeff.execution.ray import address as ray_address
from npeff.execution.ray import executor as ray_executor
from npeff.execution.ray import growth, placement
from npeff.execution.ray.executor import RayExecutor
from npeff.execution.serial import SerialExecutor
from npeff.factorization import IterationRecord
from npeff.stages.factorize import driver as solver_driver
from npeff.stages.factorize.driver import LOSSES, run_solver
from npeff.stages.factorize.worker import Step
from npeff.storage.errors import StoreError
from npeff.store.checkpoint import CheckpointStore
from npeff.tasks import TaskError
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.util import placement_group_table

pytestmark = pytest.mark.ray

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors cannot import this file

RESOURCES = {"workers": 2, "cpus_per_worker": 1, "gpus_per_worker": 0.0}


@pytest.fixture(scope="module")
def cluster():
    quiet = {"log_to_driver": False, "include_dashboard": False}
    ray.init(address="local", num_cpus=4, _node_ip_address="127.0.0.1", object_store_memory=2**27, **quiet)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def executor(cluster):
    with contextlib.closing(RayExecutor("local", **RESOURCES, timeout_s=120.0)) as executor:
        yield executor


class Calculator:
    def __init__(self, scratch: Path = Path()) -> None:
        self._scratch = scratch

    def late_square(self, item: int) -> int:
        time.sleep(0.5 if item == 0 else 0.0)
        return item * item

    def square_at_second_attempt(self, item: int) -> int:
        if item == 2 and self._attempt(item) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item

    def find_damage(self, item: int) -> None:
        raise StoreError(f"/data/{item} is damaged", "delete it", path=Path(f"/data/{item}"))

    def kill_own_process(self, item: int) -> None:
        self._attempt(item)
        os.kill(os.getpid(), signal.SIGKILL)

    def die_at_two_and_raise_at_three(self, items: tuple[int, ...]) -> list[int]:
        for item in items:
            self._attempt(item)
            if item == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            if item == 3:
                raise TaskError("item 3 cannot be read")
        return [item * item for item in items]

    def raise_at_three(self, item: int) -> int:
        self._attempt(item)
        if item == 3:
            raise MemoryError("unable to allocate 3 TiB")
        return item * item

    def always_raise(self, item: int) -> int:
        self._attempt(item)
        raise TaskError("the file server is gone")

    def stop_own_process_at_five(self, item: int) -> int:
        if item == 5 and self._attempt(item) == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return item * item

    def fill_the_disk(self, item: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", f"/data/{item}")

    def lose_the_network(self, item: int) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "the data server hung up")

    def process_and_threads(self, item: int) -> tuple[int, int]:
        return os.getpid(), torch.get_num_threads()

    def _attempt(self, item: int) -> int:
        mark = self._scratch / f"{item}.{time.monotonic_ns()}"
        mark.touch()
        return len(list(self._scratch.glob(f"{item}.*")))


def attempts(scratch: Path, item: int) -> int:
    return len(list(scratch.glob(f"{item}.*")))


class Unconstructible:
    def __init__(self) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/gone")

    def late_square(self, item: int) -> int:
        return item * item


def test_both_executors_give_the_same_results_in_whatever_order_they_are_finished(executor):
    serial = dict(SerialExecutor().map(WorkerSpec(Calculator), "late_square", range(6)))
    list(executor.map(WorkerSpec(Calculator), "late_square", range(1, 5)))  # both actors have started by then
    items = list(executor.map(WorkerSpec(Calculator), "late_square", range(6)))
    assert dict(items) == serial == {item: item * item for item in range(6)}
    assert len(items) == 6
    assert items[0] != (0, 0)  # which is the slow one


class Individual:
    def __init__(self) -> None:
        self._id = uuid.uuid4().hex

    def who(self, item: int) -> tuple[int, str]:
        return os.getpid(), self._id


@pytest.mark.parametrize("kind", ["serial", "ray"])
def test_workers_of_the_same_spec_go_on_and_those_of_another_are_new(kind, executor):
    workers, spec = SerialExecutor() if kind == "serial" else executor, WorkerSpec(Individual)
    first = set(dict(workers.map(spec, "who", range(4))).values())
    next(iter(workers.map(spec, "who", [0])))
    again = set(dict(workers.map(spec, "who", range(4))).values())
    assert len(first | again) == len({process for process, _ in first | again})
    other = set(dict(workers.map(WorkerSpec(Individual), "who", range(4))).values())
    assert not other & (first | again)


def test_no_items_need_no_workers(executor):
    assert list(executor.map(WorkerSpec(Unconstructible), "late_square", [])) == []


def test_an_item_whose_worker_is_killed_is_given_to_another(executor, tmp_path):
    spec = WorkerSpec(Calculator, {"scratch": tmp_path})
    assert dict(executor.map(spec, "square_at_second_attempt", range(5))) == {i: i * i for i in range(5)}
    assert attempts(tmp_path, 2) == 2


@pytest.mark.slow  # one of the items of the next test does the same
def test_an_item_that_kills_its_workers_is_given_up_after_three_attempts(executor, tmp_path):
    with pytest.raises(ExecutorError, match=f"kill_own_process 7 failed after {ATTEMPTS} attempts") as error:
        list(executor.map(WorkerSpec(Calculator, {"scratch": tmp_path}), "kill_own_process", [7]))
    assert attempts(tmp_path, 7) == ATTEMPTS == 3
    assert "\n" not in str(error.value)


def collect(results, finished):
    for item, _ in results:
        finished.append(item)


def one_by_one(items: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(item,) for item in items]


@pytest.mark.slow
def test_items_that_fail_three_times_are_told_after_all_others_are_finished(executor, tmp_path):
    spec, finished = WorkerSpec(Calculator, {"scratch": tmp_path}), []
    spans = [(0, 1), (2, 3), (4, 5)]
    results = executor.map(spec, "die_at_two_and_raise_at_three", spans, keep_going=True, split=one_by_one)
    with pytest.raises(ItemsFailedError) as error:
        collect(results, finished)
    assert sorted(finished) == [(0, 1), (4, 5)]
    failed = {each.item: each.reason for each in error.value.failed}
    assert failed == {(2,): "its worker was lost (ActorDiedError)", (3,): "item 3 cannot be read"}
    assert attempts(tmp_path, 2) == ATTEMPTS
    assert attempts(tmp_path, 3) == ATTEMPTS - 1, "the first attempt of the two ended at the one before"
    assert "\n" not in str(error.value)


def test_in_this_process_they_are_told_likewise(tmp_path):
    spec, finished = WorkerSpec(Calculator, {"scratch": tmp_path}), []
    with pytest.raises(
        ItemsFailedError, match=r"3 attempts \(last error: out of memory \(unable to allocate 3 TiB\)\)"
    ):
        collect(SerialExecutor().map(spec, "raise_at_three", range(6), keep_going=True), finished)
    assert finished == [0, 1, 2, 4, 5]
    assert attempts(tmp_path, 3) == ATTEMPTS


def test_where_everything_fails_it_ends_long_before_all_has_been_tried(tmp_path):
    spec = WorkerSpec(Calculator, {"scratch": tmp_path})
    with pytest.raises(ExecutorError, match="12 attempts in a row failed"):
        list(SerialExecutor().map(spec, "always_raise", range(100), keep_going=True))
    with pytest.raises(FileNotFoundError):
        list(SerialExecutor().map(WorkerSpec(Unconstructible), "late_square", [4], keep_going=True))
    with pytest.raises(OSError, match="No space left"):
        list(SerialExecutor().map(spec, "fill_the_disk", [4], keep_going=True))


@pytest.mark.slow
def test_a_hung_worker_is_replaced_after_the_timeout(executor, tmp_path, monkeypatch):
    spec, events = WorkerSpec(Calculator, {"scratch": tmp_path}), []

    def told(*event):  # the replacement may take its time to start
        events.append(event)
        monkeypatch.setattr(executor, "_timeout_s", 120.0)

    monkeypatch.setattr(ray_executor._logger, "warning", told)
    results = executor.map(spec, "stop_own_process_at_five", range(6))
    finished = [next(results)[0] for _ in range(5)]
    monkeypatch.setattr(executor, "_timeout_s", 3.0)
    assert sorted(finished) + [item for item, _ in results] == list(range(6))
    assert attempts(tmp_path, 5) == 2
    assert len(events) == 1


@pytest.mark.parametrize("kind", ["serial", pytest.param("ray", marks=pytest.mark.slow)])
def test_exceptions_of_the_work_come_through_as_themselves(kind, executor):
    chosen = SerialExecutor() if kind == "serial" else executor
    with pytest.raises(OSError, match="No space left") as full:
        list(chosen.map(WorkerSpec(Calculator), "fill_the_disk", [4]))
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, "/data/4")
    with pytest.raises(ConnectionResetError, match="the data server hung up"):
        list(chosen.map(WorkerSpec(Calculator), "lose_the_network", [4]))
    with pytest.raises(StoreError, match="is damaged: delete it") as damaged:
        list(chosen.map(WorkerSpec(Calculator), "find_damage", [4]))
    assert (damaged.value.problem, damaged.value.remedy) == ("/data/4 is damaged", "delete it")
    assert damaged.value.path == Path("/data/4")
    with pytest.raises(FileNotFoundError) as gone:
        list(chosen.map(WorkerSpec(Unconstructible), "late_square", [4]))
    assert gone.value.filename == "/data/gone"


class Member:
    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def place(self) -> tuple[int, int]:
        return self._rank, self._size

    def fail_on_one(self) -> None:
        """Rank 1 fails; the others wait for it, as in an all-reduce."""
        if self._rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(300)

    def die_on_one(self) -> None:
        if self._rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(300)


@pytest.mark.slow  # tests/stages/test_solver_workers.py has the same without Ray
def test_a_group_knows_its_places_and_tells_of_a_loss_while_others_wait(executor):
    with executor.group(WorkerSpec(Member)) as group:
        assert group.call("place") == [(0, 2), (1, 2)]
        assert group.call_one(1, "place") == (1, 2)
        with pytest.raises(OSError, match="No space left") as full:
            group.call("fail_on_one")
        assert full.value.errno == errno.ENOSPC
    began = time.monotonic()
    with executor.group(WorkerSpec(Member)) as group, pytest.raises(WorkerLostError, match="die_on_one: a worker"):
        group.call("die_on_one")
    assert time.monotonic() - began < 50  # long before the timeout


class StubSolver:
    """Counts to six; as rank 1 it stops its process (as a hung one) the first time that it is at `stops_at`."""

    def __init__(self, mark: Path, stops_at: int, rank: int, size: int) -> None:
        self._mark, self._stops_at, self._rank, self._iteration = mark, stops_at, rank, 0

    def open_rendezvous(self) -> tuple[str, int]:
        return "127.0.0.1", 0

    def connect(self, host: str, port: int) -> None: ...

    def load(self, checksums: dict[int, str]) -> None: ...

    def initialize(self) -> None: ...

    def start(self, components: None) -> None: ...

    def resume(self, checkpoint) -> None:
        self._iteration = int(checkpoint.arrays["iteration"])

    def step(self):
        self._iteration += 1
        if self._rank == 1 and self._iteration == self._stops_at and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        record = IterationRecord(
            iteration=self._iteration, loss=1.0, objective=1.0, explained=0.0, mu=1.0, accepted=True, n_dead=0
        )
        return Step(record, "counted" if self._iteration == 6 else None, 0)

    def save(self, folder: Path):
        return {"iteration": torch.tensor(self._iteration).numpy()}

    def finish(self) -> int:
        return self._iteration


class _GroupsInReach:
    """The executor, with the group that was formed last and how many there were."""

    def __init__(self, executor: RayExecutor) -> None:
        self.workers, self._executor, self.formed = executor.workers, executor, 0

    @contextlib.contextmanager
    def group(self, spec: WorkerSpec):
        with self._executor.group(spec) as self.last:
            self.formed += 1
            yield self.last


@pytest.mark.slow  # tests/stages/test_solver_workers.py has the same fault without Ray
def test_a_hung_solver_worker_is_replaced_and_the_group_goes_on_from_the_checkpoint(executor, tmp_path):
    steps, events, groups = [], [], _GroupsInReach(executor)

    def on_iteration(row):
        steps.append(row["iteration"])
        if groups.formed == 1 and row["iteration"] == 3:  # all have started: the next step may not take long
            groups.last._timeout_s = 2.0

    result = run_solver(
        groups,
        WorkerSpec(StubSolver, {"mark": tmp_path / "stopped", "stops_at": 4}),
        CheckpointStore(tmp_path / "checkpoints", config_hash="none"),
        {},
        checkpoint_every=2,
        on_iteration=on_iteration,
        on_event=events.append,
    )
    assert steps == [1, 2, 3, 3, 4, 5, 6]  # the steps after checkpoint 2 are redone, no others
    assert [row["iteration"] for row in result.history] == [1, 2, 3, 4, 5, 6]
    assert result.results == [6, 6]
    assert events == [
        "step: no answer within 2 s: restarting the workers from iteration 2",
        "resuming from iteration 2",
    ]


class _NeverThere:
    """An executor whose groups are lost as soon as they are asked for anything."""

    workers = 2

    def group(self, spec: WorkerSpec):
        raise WorkerLostError("load: a worker was lost (ActorDiedError)")


def test_the_solver_is_given_up_when_groups_are_lost_without_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(solver_driver, "_BACK_OFF_S", 0.1)
    events: list[str] = []
    with pytest.raises(ExecutorError, match=f"lost {LOSSES} times in a row .*run the same command again"):
        run_solver(
            _NeverThere(),
            WorkerSpec(StubSolver),
            CheckpointStore(tmp_path, config_hash="none"),
            {},
            tmp_path / "partial",
            checkpoint_every=2,
            on_iteration=lambda row: None,
            on_event=events.append,
        )
    assert len(events) == LOSSES - 1


def test_workers_hold_their_lease_until_their_processes_are_gone(executor, tmp_path):
    lease = tmp_path / "workers"

    def is_held() -> bool:
        with open(lease, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    results = executor.map(WorkerSpec(Calculator, {}, lease), "process_and_threads", range(2))
    _, (process, threads) = next(results)
    assert (process != os.getpid(), threads) == (True, 1)
    assert is_held()
    results.close()
    with executor.group(WorkerSpec(StubSolver)):  # whose processes take the place of the former
        pass
    deadline = time.monotonic() + 30
    while is_held():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_more_cpus_than_the_cluster_has_are_refused_in_one_line(executor, monkeypatch):
    monkeypatch.setattr(placement, "_TOO_SMALL_S", 0.5)
    with pytest.raises(
        ExecutorError, match=r"has no room for 64 workers with 1 CPU each .*lower executor\.workers"
    ) as error:
        RayExecutor("local", workers=64, cpus_per_worker=1, gpus_per_worker=0.0, timeout_s=60.0)
    assert "\n" not in str(error.value)


def test_a_cluster_that_others_use_is_waited_for_and_the_line_says_what_is_free(executor, monkeypatch, capfd):
    monkeypatch.setattr(placement, "_TELL_AFTER_S", 0.2)
    monkeypatch.setattr(placement, "_TOO_SMALL_S", 0.1)
    with pytest.raises(
        ExecutorError, match=r"^other programs use the cluster, and it has no room for 4 workers .*2 CPU"
    ):
        placement.WorkerPlacement(4, cpus=1, gpus=0.0, one_node=False, timeout_s=1.0)
    assert "2 CPU of 4 CPU in the cluster are free (0 s of at most 1 s)" in capfd.readouterr().err


def test_tenths_of_a_gpu_are_counted_as_ray_does(executor, monkeypatch):
    monkeypatch.setattr(placement.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 16.0, "GPU": 1.0}}])
    place = placement.WorkerPlacement.__new__(placement.WorkerPlacement)
    for gpus, room in ((0.1, 10), (0.3, 3), (0.0999, 10), (1.0, 1)):
        place._bundle, place._bundles = {"CPU": 1.0, "GPU": gpus}, 1
        assert place._room() == room, gpus


class Gcs:
    """Ray's server as an autoscaler has left it: of the first version with node types, or of the second version."""

    def __init__(self, status: bytes = b"", *, version: int = 0, refuses: bool = False) -> None:
        self._status, self._version, self._refuses = status, version, refuses

    def internal_kv_get(self, key: bytes) -> bytes:
        return self._status

    def get_cluster_status(self, timeout_s: float) -> bytes:
        reply = GetClusterStatusReply()
        reply.autoscaling_state.autoscaler_state_version = self._version
        for group in placement_group_table() if self._refuses else ():
            request = reply.autoscaling_state.infeasible_gang_resource_requests.add()
            request.details = f"{group}:PACK|PENDING"
        return reply.SerializeToString()


def of_node_types(*kinds: str) -> Gcs:
    report = {"active_nodes": dict.fromkeys(kinds, 1), "idle_nodes": None}
    return Gcs(json.dumps({"autoscaler_report": report}).encode())


@pytest.mark.parametrize(
    ("gcs", "waits_s"),
    [
        (of_node_types("node_0a1b"), 0.5),  # no autoscaler
        (of_node_types("head", "gpu-spot"), 1.5),
        (Gcs(version=2, refuses=True), 0.5),
        (Gcs(version=2), 1.5),
    ],
    ids=["none", "first version", "second version: never", "second version: may come"],
)
def test_room_is_waited_for_as_long_as_the_autoscaler_may_make_it(executor, monkeypatch, capfd, gcs, waits_s):
    monkeypatch.setattr(placement, "_TELL_AFTER_S", 0.2)
    monkeypatch.setattr(placement, "_TOO_SMALL_S", 0.5)
    monkeypatch.setattr(placement, "in_job", lambda: waits_s == 0.5)  # it matters only where nothing is known
    monkeypatch.setattr(growth, "_gcs", lambda: gcs)
    with pytest.raises(ExecutorError, match=r"has no room for 64 workers .*4 CPU in total, room for 4, and did not"):
        placement.WorkerPlacement(64, cpus=1, gpus=0.0, one_node=False, timeout_s=1.5)
    told = capfd.readouterr().err
    assert "waiting for room for 64 workers with 1 CPU each: " in told
    assert f"of at most {waits_s:.0f} s)" in told


@pytest.mark.parametrize("status", [b"", b"null", b"{", b'{"autoscaler_report": []}'])
def test_a_status_of_another_form_says_nothing_about_growth(monkeypatch, status):
    monkeypatch.setattr(growth, "_gcs", lambda: Gcs(status))
    assert growth.nodes_may_come(None) is None
    monkeypatch.setattr(growth, "_gcs", lambda: None)
    assert growth.nodes_may_come(None) is None


def no_ray(**arguments):
    raise ConnectionError(f"ray.init({arguments['address']}):\nno such thing")


def test_a_cluster_that_is_not_there_is_refused_in_one_line(monkeypatch):
    # in this process Ray is up, and an executor joins the Ray that is
    monkeypatch.setattr(ray_executor.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_executor.ray, "init", no_ray)
    with pytest.raises(ExecutorError, match=r"cannot reach Ray at '127\.0\.0\.1:1'") as error:
        RayExecutor("127.0.0.1:1", workers=1, cpus_per_worker=1, gpus_per_worker=0.0, timeout_s=5.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", None])
def test_a_server_that_is_not_rays_is_refused_in_one_line(monkeypatch, answer):
    monkeypatch.setattr(ray_executor.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_executor.ray, "init", no_ray)
    monkeypatch.setattr(ray_address, "_CONNECTS_WITHIN_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                asked.append(connection.recv(100))
                if answer is None:  # says nothing until the client leaves
                    connection.recv(100)
                else:
                    connection.sendall(answer)

        asked, address = [], f"127.0.0.1:{server.getsockname()[1]}"
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ExecutorError, match=rf"^the server at '{address}' is not Ray's .*set executor\.address"):
            RayExecutor(address, workers=1, cpus_per_worker=1, gpus_per_worker=0.0, timeout_s=5.0)
        thread.join()
    assert asked[0].startswith(b"PRI * HTTP/2.0")


def test_a_worker_on_a_file_system_without_locks_is_one_line(monkeypatch, tmp_path):
    def refuse(_file, _how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ray_actor.fcntl, "flock", refuse)
    said = rf"^the file system of {tmp_path} does not support locks on .* \(No locks available\): mount it there"
    with open(tmp_path / "lease", "w") as file, pytest.raises(ExecutorError, match=said):
        ray_actor._share_lock(file, tmp_path / "lease")
