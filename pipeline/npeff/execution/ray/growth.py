"""What the autoscaler of a Ray cluster says about a placement group: whether nodes for it may come.

Ray has two autoscalers, and no public interface says which one runs or whether there is one. The second version, which
``ray up`` and KubeRay start, reports which placement groups no node that it could start would hold. It reports this
for a cluster without an autoscaler, too. The first version, which ``ray start`` runs on a head node, reports the types
of the nodes. Without an autoscaler, these are made of the ids of the nodes.
"""

from __future__ import annotations

import json
from typing import Any

from ray.util.placement_group import PlacementGroup

_READONLY_NODE_TYPE = "node_"
"""Beginning of the node types in the status of the first version where the cluster has no autoscaler."""
_ANSWER_S = 10.0


def nodes_may_come(group: PlacementGroup) -> bool | None:
    """Return whether the autoscaler can start the nodes for a placement group that has been pending for seconds.

    Returns:
        False also if the cluster has no autoscaler; None if this is not known, for example because no autoscaler has
        reported yet or the report has another form.
    """
    try:
        answer = _of_second_version(group)
        return _of_first_version() if answer is None else answer
    except Exception:  # private interfaces, whose errors have no common class; without an answer, the caller waits
        return None


def _of_second_version(group: PlacementGroup) -> bool | None:
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply.FromString(_gcs().get_cluster_status(timeout_s=_ANSWER_S))
    state = reply.autoscaling_state
    if not state.autoscaler_state_version:
        return None
    # the text of `details` is "ID:STRATEGY|STATE"
    refused = {request.details.partition(":")[0] for request in state.infeasible_gang_resource_requests}
    return group.id.hex() not in refused


def _of_first_version() -> bool | None:
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS

    report = json.loads(_gcs().internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode()) or b"{}").get("autoscaler_report")
    kinds = [kind for part in ("active_nodes", "idle_nodes") for kind in (report or {}).get(part) or {}]
    return any(not kind.startswith(_READONLY_NODE_TYPE) for kind in kinds) if kinds else None


def _gcs() -> Any:
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    return internal_kv_get_gcs_client()
