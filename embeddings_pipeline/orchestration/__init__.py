"""The only room that imports Dagster: component, assets, checks, jobs, sensors and schedules, and runs of our own.

The command line calls `sync` and `switch`; Dagster loads the rest. What Dagster does not document is imported in
`dagster_internals` alone.
"""

import warnings

# What we use of Dagster's betas; warnings about others still show. Their class is Dagster's, which is not imported yet.
for parameter in ("backfill_policy", "execution_type"):
    warnings.filterwarnings("ignore", rf"Parameter `{parameter}`")
