"""Telling people: one structured line in the log, and a POST to ALERT_WEBHOOK_URL if that is set."""

import http.client
import json
import logging
import urllib.request
from datetime import UTC, datetime
from typing import Any

from embeddings_pipeline.config.settings import Settings, revealed

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 5


def alert(settings: Settings, event: str, text: str, **details: Any) -> bool:
    """Say that something needs a person: `text` in a sentence, `details` for programs. Whether the webhook took it.

    The body is JSON: `text` (what Slack, Mattermost and Teams show), `event`, `at` and the details. An alert never
    fails what it is about: a webhook that does not answer is a line in the log.
    """
    body = {"event": event, "at": datetime.now(UTC).isoformat(timespec="seconds"), "text": text, **details}
    line = json.dumps(body, ensure_ascii=False, default=str)
    log.error("alert %s", line)
    if (url := revealed(settings.alert_webhook_url)) is None:
        return False
    try:
        request = urllib.request.Request(
            url,
            data=line.encode(),
            headers={"Content-Type": "application/json", "User-Agent": "embeddings-pipeline"},
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
            return True
    except (OSError, ValueError, http.client.HTTPException) as error:
        # No more than the kind of it: the URL is a secret, and stands in some of these errors.
        log.warning("ALERT_WEBHOOK_URL did not take an alert: %s", type(error).__name__)
        return False
