"""The record of which items exist, what was last seen of them, what is committed, and so what there is to do.

The pipeline, model changes, health, orchestration and the command line call it, all through `ledger.Ledger`.
"""
