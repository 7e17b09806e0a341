"""The ``npeff`` command as the entry point of a Ray job. It needs the checkout only, no installation.

    ray job submit --working-dir . -- python jobs/run.py run jobs/quickstart.yaml

Arguments, output and exit codes are those of ``npeff``. The run joins the cluster that the job runs on, whatever
``executor.address`` says, and resumes from what is in the run directory.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pipeline"))

from npeff.cli.entry import command

if __name__ == "__main__":
    command()
