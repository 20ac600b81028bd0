"""Changing a collection's model: expand, backfill, swap, roll back, contract. Called by orchestration and cli.
A phase is a list of steps (`steps`), which `phases` runs and `plan` prints; `preflight` refuses, `gate` measures.
"""
