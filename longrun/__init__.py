"""Longrun: one long training run, extended by every file you drop.

Floors, each importing only from those below it:

    training    the trainer; alone imports torch, transformers, datasets, accelerate
    loop        the daemon's tick: the one place that knows the order of things
    pulse       inbox, worker, status, journal: things that watch or talk
    disk facts  config, home, disk, examine, checkpoint, ledger: what is on disk
    values      errors, job, plan, lineage, rows, wire: no I/O, no clock
"""

__version__ = "0.1.0"
