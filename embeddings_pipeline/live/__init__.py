"""`live`: a process that stays, its model loaded, and brings a committed change into the answers within seconds.

It watches the source, derives the work from the ledger as the sensor does, and does it with `run_batch`. The command
line and Dagster's job start it.
"""
