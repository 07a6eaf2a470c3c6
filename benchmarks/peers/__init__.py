"""Side by side with the peers: the same model, data and faults under each system.

settings         what a run is: read by the driver and by every trainer
training         the loop body and the log that the peers' trainers share
train_torchrun   plain DDP, and with checkpoints under an elastic torchrun
train_torchft    TorchFT
train_ray        Ray Train; ours needs no loop of its own: it is `elastic train`
systems          starts each of them, finds its processes, ends it
records          one form for what all of them log
faults           signals to processes
scenarios        which faults, when
driver           runs a scenario on a system: one JSON a run
measures         what a run cost: gaps, steps redone, goodput; pure
report           the table; pure
plots            the pictures
run              installs, runs all, writes all
"""
