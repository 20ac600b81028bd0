"""One batch from the source to PostgreSQL: read, render, embed, commit, and `run_batch`, which knows their order.

Orchestration, model changes and health call it; it knows nothing of Dagster.
"""
