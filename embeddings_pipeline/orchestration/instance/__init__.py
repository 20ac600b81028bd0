"""What dagster.yaml names: storage on the pipeline's PostgreSQL, a launcher, and whether a run's process lives.

Dagster loads it by those names; `runner` and `automation` ask it for liveness.
"""
