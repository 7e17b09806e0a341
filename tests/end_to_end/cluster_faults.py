"""A solver on a simulated cluster that loses a node, and gets another one later.

    PYTHONPATH=tests RAY_AUTH_MODE=token RAY_AUTH_TOKEN=... python -m end_to_end.cluster_faults FOLDER

prints, as JSON, what happened and when; how long the run took with and without; and how far the losses are apart.
`test_lost_node.py` runs it in a process of its own, because what Ray does about tokens is settled when it is imported;
the solver's benchmark runs it to state what a lost node costs.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import ray
from npeff.execution.executor import Executor, WorkerSpec
from npeff.execution.ray.executor import RayExecutor
from npeff.execution.ray.private import on_loopback
from npeff.execution.serial import SerialExecutor
from npeff.factorization import SolverOptions
from npeff.stages.factorize.driver import SolverRun, run_solver
from npeff.stages.factorize.worker import SolverWorker
from npeff.stages.fitted_examples import FittedExamples
from npeff.store.checkpoint import CheckpointStore
from npeff.store.shard_records import ShardRecords
from planted import planted_fishers
from planted_run import SIGNATURE, planted_run
from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 80 * 2**20, "include_dashboard": False}
N_COMPONENTS, LOST_AT, ITERATIONS = 8, 5, 16


def main(folder: Path) -> dict[str, Any]:
    truth = planted_fishers(n_examples=900, rank=3, dim=64, n_components=N_COMPONENTS, noise=0.3, seed=0)
    run = planted_run(folder / "run", truth, shard_size=180)
    records = ShardRecords(run.shard_records, SIGNATURE).complete()
    events: list[tuple[str, float]] = []
    began = time.monotonic()

    def say(event: str) -> None:
        events.append((event, time.monotonic() - began))

    def solve(executor: Executor, name: str, on_iteration: Any) -> tuple[SolverRun, float]:
        start = time.monotonic()
        arguments = {
            "examples": FittedExamples(run.fishers, run.table("examples")),
            "options": SolverOptions(
                n_components=N_COMPONENTS, max_iterations=ITERATIONS, tolerance=1e-15, subsample=200
            ),
            "device": "cpu",
            "timeout_s": 300.0,
            "memory_limit_bytes": 2**30,
        }
        solved = run_solver(
            executor,
            WorkerSpec(SolverWorker, arguments),
            CheckpointStore(folder / name, config_hash="none"),
            {shard: record.checksum for shard, record in records.items()},
            checkpoint_every=2,
            on_iteration=on_iteration,
            on_event=say,
        )
        return solved, time.monotonic() - start

    one_process, _ = solve(SerialExecutor(), "one process", lambda row: None)
    with on_loopback():
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        node = cluster.add_node(**NODE)
        ray.init(address=cluster.address, log_to_driver=False)

    def disturb(row: dict[str, Any]) -> None:
        if row["iteration"] == LOST_AT and not events:
            say("node removed")
            cluster.remove_node(node, allow_graceful=False)
        elif any("restarting the workers from" in event for event, _ in events):
            if row["sent_bytes"] == 0 and not any(event == "node added" for event, _ in events):
                say("node added")
                cluster.add_node(**NODE)
        elif row["iteration"] >= LOST_AT:
            time.sleep(1)  # steps are so short that many would be made until the actor on the lost node ends

    try:
        with contextlib.closing(
            RayExecutor(cluster.address, workers=2, cpus_per_worker=1, gpus_per_worker=0.0, timeout_s=300.0)
        ) as executor:
            _, undisturbed_s = solve(executor, "undisturbed", lambda row: None)
            disturbed, disturbed_s = solve(executor, "disturbed", disturb)
    finally:
        ray.shutdown()
        cluster.shutdown()
    losses, expected = ([row["loss"] for row in solved.history] for solved in (disturbed, one_process))
    return {
        "token_authentication": ray._private.authentication.authentication_utils.is_token_auth_enabled(),
        "events": events,
        "undisturbed_s": undisturbed_s,
        "disturbed_s": disturbed_s,
        "sent_bytes": [row["sent_bytes"] for row in disturbed.history],
        "n_iterations": [len(losses), len(expected)],
        "largest_difference_of_losses": max(
            abs(loss - other) / other for loss, other in zip(losses, expected, strict=False)
        ),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
