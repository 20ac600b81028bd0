"""The only package that imports Dagster."""

import warnings

from dagster import BetaWarning

# What we use of Dagster's betas; warnings about others still show.
for parameter in ("backfill_policy", "execution_type"):
    warnings.filterwarnings("ignore", rf"Parameter `{parameter}`", BetaWarning)
