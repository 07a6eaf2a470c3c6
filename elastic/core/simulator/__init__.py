"""The step protocol in virtual time under seeded faults, checked after every event.

The worker, aggregator and coordinator classes are the ones of real jobs (`elastic.core.protocol`);
processes, sockets, shared memory and time are simulated, so that a process can die, stop or come
back between any two actions, and a thousand jobs take seconds.

    from elastic.core.simulator.search import search
    tried = search(range(10_000), processes=2)      # or: elastic simulate protocol --seeds 10000
    if tried.failure is not None:
        print(tried.failure)                        # the schedule, shrunk, and how it went wrong
    tried.seen["refused: stale"]                    # what happened, and how often

One schedule, to look at it: `check(random_schedule(4711), tried=tried)`, or
`elastic simulate protocol --seed 4711`.

| module | holds |
|---|---|
| `faults` | a schedule of faults as data; a seed gives one |
| `search` | many schedules, on all cores; shrinks the first that breaks an invariant |
| `job` | one job: its processes, and the faults that strike them |
| `worker_process`, `aggregator_process`, `coordinator_process` | what the actors are in reality |
| `updating` | what the aggregators do of a round: sums, parameters, state that moves |
| `world` | the clock, processes, sockets |
| `memory` | shared memory, where stores may be half done |
| `truth` | what an undisturbed job computes, worked out without the protocol |
| `invariants` | what must hold after every event |
| `fleet`, `judging` | made-up steps of up to 10,000 workers with faults, for the fault detector |
| `build` | which classes run; tests put broken ones there |
"""
