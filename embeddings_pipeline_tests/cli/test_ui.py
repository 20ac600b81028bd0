"""What `ui` passes on of what Dagster says."""

import io

import pytest

from embeddings_pipeline.cli.ui import tell

TIME = "2026-11-25 21:11:32 +0000"
COLOURED = f"\x1b[32m{TIME}\x1b[0m - dagster.daemon.EventLogConsumerDaemon - \x1b[34mWARNING\x1b[0m - "
ALERT = 'alert {"event": "run_failed", "text": "collection \'films\': item_ledger failed: why"}\n'
FAILED_RUN = f"""{TIME} - dagster - ERROR - films_scan - f5c448ab - 10471 - STEP_FAILURE - Execution of step "x" failed.

Failed: collection 'films': why

Stack Trace:
  File "steps.py", line 24, in failures
"""


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (f"{COLOURED}No cursor for event type RUN_FAILURE, ignoring older events\n", ""),
        (f"{TIME} - dagster - DEBUG - films_scan - f5c448ab - 10471 - RUN_START - Started.\n", ""),
        (
            f"{COLOURED}the disk is full\n",
            f"{TIME} - dagster.daemon.EventLogConsumerDaemon - WARNING - the disk is full\n",
        ),
        ("Traceback (most recent call last):\n  File\n", "Traceback (most recent call last):\n  File\n"),
        (FAILED_RUN, ""),
        (FAILED_RUN + ALERT, "ALERT: collection 'films': item_ledger failed: why\n"),
        (
            FAILED_RUN + f"{TIME} - dagster - ERROR - it hangs\n  here\n",
            f"{TIME} - dagster - ERROR - it hangs\n  here\n",
        ),
        ('alert {"event": "cut o\n', 'alert {"event": "cut o\n'),
    ],
)
def test_a_person_reads_alerts_and_what_is_for_them(capsys: pytest.CaptureFixture[str], said: str, told: str) -> None:
    tell(io.StringIO(said))
    assert capsys.readouterr().out == told
