"""The driver of one job among several: `python -m elastic.experts.island JOB.json RUN_DIR`.

Begins the job, or goes on where its run ended. Whoever started it reads the run folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(job_file: str, run_dir: str) -> None:
    """Run the job to its end."""
    from elastic.core.config import load_job
    from elastic.driver import run_job

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where a user's task lies
    result = run_job(load_job(Path(job_file)), run_dir=Path(run_dir), resume=True)
    if result.metrics["outcome"] != "finished":
        raise SystemExit(3)  # it was asked to stop


if __name__ == "__main__":
    main(*sys.argv[1:])
