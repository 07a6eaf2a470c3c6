"""Measurements on real processes. Each script prints and writes one JSON per benchmark.

ddp        the peer: plain DistributedDataParallel over gloo
step       step time, memory, cost of control, convergence, beside the peer
recovery   what faults, stragglers and joins cost, beside the peer
stragglers straggler policies in virtual time: published figures, auto beside the others, decoding
straggler_runs the same on real workers with recorded delays, beside what is simulated
cluster    what many nodes cost: the exchange between them beside gloo
chaos      random schedules of faults; every run must end with the same bits
table      the newest results as a table for the README
peers      side by side with DDP, torchrun, TorchFT and Ray Train, under the same faults
"""
