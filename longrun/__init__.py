"""Longrun: one long training run, extended by every file you drop.

Floors, each importing only from those below it:

    training    the trainer; alone imports torch, transformers, datasets, accelerate, trl
    programs    what daemon.py, train.py and backup_manager.py do, command by command
    loop        the daemon's tick: the one place that knows the order of things
    pulse       inbox, worker, journal: things that watch or talk
    disk facts  config, home, disk, examine, checkpoint, ledger, store: what is on disk
    values      errors, job, plan, lineage, manifest, wire: no I/O, no clock

tests/unit/test_architecture.py names every module and holds them to it.
"""

__version__ = "0.1.0"
