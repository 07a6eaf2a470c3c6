"""A run folder as an aggregator would have written it, made up in no time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elastic.core.runs import RunFolder

START_S = 1_700_000_000.0
MICRO_BATCHES = 16


class FakeRun:
    """Writes the folder of a made-up run: workers with speeds, and faults at chosen steps."""

    def __init__(
        self,
        path: Path,
        *,
        num_steps: int,
        micro_batch_s: float = 0.02,
        is_watched: bool = False,
    ) -> None:
        self.folder = RunFolder(path)
        self.folder.create()
        self.now_s = START_S + 3.0
        self.num_steps, self.micro_batch_s = num_steps, micro_batch_s
        self.workers = {0: 1.0, 1: 1.15, 2: 1.0, 3: 1.4}
        self.frozen: dict[int, int] = {}
        self.generation = 4
        self.random = random.Random(0)
        job = {
            "name": "stdlib-lm",
            "task": "examples.stdlib_lm.task:StdlibLM",
            "seed": 0,
            "steps": num_steps,
            "batch": {"micro_batches": MICRO_BATCHES, "micro_batch_size": 2},
            "workers": {"start": 4, "min": 1, "max": 8, "threads": 1},
            "precision": "float32",
            "clip_norm": 1.0,
            "monitoring": {"detect": is_watched},
        }
        self.folder.write_json(self.folder.job_json, job)
        self.event("job_started", 0, reason="4 workers", time_s=START_S)
        for worker in self.workers:
            self.event("worker_joined", 0, worker=worker, time_s=START_S + 2.5 + worker * 0.1)

    def event(self, kind: str, step: int, **more: Any) -> None:
        """Append one event, now unless told otherwise."""
        base = {"time_s": self.now_s, "kind": kind, "step": step, "generation": self.generation}
        self.folder.append_event({**base, "worker": None, "reason": "", **more})

    def run(self, faults: dict[int, str]) -> None:
        """Compute all steps; `faults` maps a step to what happens in it."""
        for step in range(self.num_steps):
            self._step(step, faults.get(step))
            if step % 50 == 49:
                self.event("checkpoint_written", step)
            if step % 40 == 39:
                self._evaluate(step + 1)
        self.event("job_finished", self.num_steps)
        self.folder.close()

    def finish(self) -> None:
        """Write the result."""
        hashes = {"params_sha256": "5e8f" * 16, "samples_sha256": "a01c" * 16}
        self.folder.write_json(self.folder.result_json, {**hashes, "exact": True, "loss": 1.0})

    def _step(self, step: int, fault: str | None) -> None:
        start_s, dead = self.now_s, set()
        free = {worker: start_s for worker in self.workers if self.frozen.get(worker, 0) <= step}
        if fault:
            self.now_s = start_s + 0.6 * self.micro_batch_s
            dead = set(self._fault(step, fault))
        work: list[list[Any]] = []
        queue = list(range(MICRO_BATCHES))
        while queue:
            micro_batch = queue.pop(0)
            worker = min(free, key=lambda worker: free[worker])
            took_s = self.micro_batch_s * self.workers.get(worker, 1.0)
            took_s *= self.random.uniform(0.9, 1.15)
            work.append([worker, micro_batch, free[worker], free[worker] + took_s, "granted"])
            free[worker] += took_s
            if worker in dead:
                work[-1][3] = self.now_s
                work[-1][4] = "refused"
                del free[worker]
                queue.append(micro_batch)
        end_s = max(free.values())
        num_duplicates = 0
        if self.random.random() < 0.3:
            idle = min(free, key=lambda worker: free[worker])
            work.append([idle, 15, free[idle], end_s - 0.001, "refused"])
            num_duplicates = 1
        stall_s = 0.15 if fault == "aggregator" else 0.0
        self.now_s = end_s + 0.004 + stall_s
        if fault == "aggregator":
            self.event("aggregator_took_over", step, reason="standby held the lock after 71 ms")
        loss = 5.5 * 0.5 ** (6 * step / self.num_steps) + 1.6 + self.random.gauss(0, 0.06)
        line = {"step": step, "time_s": self.now_s, "step_s": self.now_s - start_s, "loss": loss}
        line["metrics"] = {"accuracy": 1 - 1 / (step + 2)}
        rest = {"grad_norm": 1.0, "lr": 1e-3, "samples": 32, "attempt": 0, "update_s": 0.003}
        count = {"num_workers": len(self.workers), "num_duplicates": num_duplicates, "work": work}
        self.folder.append_metrics({**line, **rest, **count})

    def _evaluate(self, step: int) -> None:
        """Two micro-batches of held-out samples on each worker, between two steps."""
        work = [
            [worker, 2 * place + half, self.now_s + half * 0.01, self.now_s + half * 0.01 + 0.009]
            for place, worker in enumerate(self.workers)
            for half in range(2)
        ]
        self.now_s += 0.02
        line = {"step": step, "time_s": self.now_s, "loss": 1.7 + 10 / step}
        rest = {"metrics": {"accuracy": 0.5}, "work": [[*one, "granted"] for one in work]}
        self.folder.append_evaluation({**line, **rest})
        self.event("evaluated", step, reason="loss 2")

    def _fault(self, step: int, fault: str) -> Iterator[int]:
        if fault == "kill":
            victim = max(self.workers)
            self.event("fault", step, reason=f"kill worker-{victim} at after_grant", worker=victim)
            self.event("worker_lost", step, worker=victim, reason="end of file on its socket")
            self.workers[victim + 1] = self.workers.pop(victim)
            joined_s = self.now_s + 0.05
            self.event("worker_joined", step, worker=victim + 1, reason="spare", time_s=joined_s)
            self.frozen[victim + 1] = step + 1
            if len(self.workers) > 1:
                yield victim
        elif fault == "stop":
            self.event("fault", step, reason="stop worker-1 at before_compute for 0.5 s", worker=1)
            self.event("worker_hung", step, worker=1, time_s=self.now_s + 0.03)
            self.frozen[1] = step + 8
        elif fault == "aggregator":
            self.event("fault", step, reason="kill_aggregator at mid_update")
            self.event("aggregator_lost", step, reason="lock released")
        elif fault == "join":
            newcomer = max(self.workers) + 1
            self.event("fault", step, reason="add_worker")
            self.event("worker_joined", step, worker=newcomer)
            self.workers[newcomer] = 1.0
        elif fault == "slow":
            self.event("fault", step, reason="slow worker-2 3 times", worker=2)
            self.workers[2] = 3.0


FAULTS = {30: "kill", 34: "stop", 38: "aggregator", 48: "join", 60: "slow", 90: "kill"}
"""A step, and what happens in it."""
