"""Stage 1, the Fishers, as a Ray job.

    ray job submit --working-dir . -- python jobs/fishers.py --config jobs/quickstart.yaml

It joins the cluster that the job runs on, whatever the run file's executor.address says, goes on from what is in the
run directory, prints its progress into the job's log, and ends with the exit code of `npeff fishers`.
"""

import sys
from pathlib import Path

# Python puts this script's folder first on the path, and a file in it has the package's name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.cli.main import job

if __name__ == "__main__":
    job("fishers")
