"""All nodes with room for workers are lost: what is asked of the cluster then, until one comes.

    PYTHONPATH=tests RAY_AUTH_MODE=token RAY_AUTH_TOKEN=... python -m end_to_end.lost_nodes

prints, as JSON, the number of places that were asked for and not given (what lets an autoscaler start nodes) at each
moment. `test_lost_node.py` runs it in a process of its own.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import ray
from end_to_end.cluster_faults import NODE
from npeff.execution.ray.placement import WorkerPlacement
from npeff.execution.ray.private import on_loopback
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table


def places_asked_for() -> int:
    table = placement_group_table().values()
    return sum(len(group["bundles"]) for group in table if group["state"] == "PENDING")


def main() -> dict[str, Any]:
    with on_loopback():
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
        nodes = [cluster.add_node(**NODE) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False)
    found: dict[str, Any] = {}
    try:
        placement = WorkerPlacement(2, cpus=1, gpus=0.0, one_node=False, timeout_s=120.0)
        found["whole"] = places_asked_for()
        for node in nodes:
            cluster.remove_node(node, allow_graceful=False)
        while sum(node["Alive"] for node in ray.nodes()) > 1:
            time.sleep(0.1)
        renewing = threading.Thread(target=placement.renew)
        renewing.start()
        while not places_asked_for():
            time.sleep(0.1)
        found["without nodes"] = places_asked_for()
        cluster.add_node(**NODE)
        renewing.join()
        found["places with one node"] = placement.count
        found["with one node"] = places_asked_for()
        found["can be larger with one node"] = placement.can_be_larger()
        cluster.add_node(**NODE)
        while not placement.can_be_larger():
            time.sleep(0.1)
        placement.renew()
        found["places with two nodes"] = placement.count
        found["with two nodes"] = places_asked_for()
        placement.remove()
    finally:
        ray.shutdown()
        cluster.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
