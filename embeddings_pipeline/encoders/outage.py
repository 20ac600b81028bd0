"""Which errors of a service are outages, by kind and never by trying texts apart (rule 7), and how long they last."""

import errno
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime

_OUTAGES = {408, 409, 425, 429}
_NETWORK = {
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EPIPE,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.EHOSTDOWN,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
}
# Of HTTP clients, whose classes need not be installed: httpx, aiohttp, requests, openai and others name them so.
_NAMES = re.compile(r"TransportError|\w*ConnectionError|\w*Timeout(Error)?|ServerDisconnectedError")
_DURATION = re.compile(r"([\d.]+)(ms|h|m|s)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def is_outage_status(status: int) -> bool:
    """Whether another try may be answered otherwise."""
    return status in _OUTAGES or status >= 500


def is_outage(error: BaseException) -> bool:
    """Whether an error of a client says that a service, or the way to it, is down for now."""
    status = status_of(error)
    if status is not None:
        return is_outage_status(status)
    return any(_is_of_network(each) for each in _chain(error))


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error carries, or one that it came from: as `status_code`, `status`, `code`, or of its
    `response`.
    """
    for each in _chain(error):
        for holder in (each, getattr(each, "response", None)):
            for name in ("status_code", "status", "code"):
                value = getattr(holder, name, None)
                if isinstance(value, int) and 400 <= value <= 599:
                    return int(value)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    next_one: BaseException | None = error
    while isinstance(next_one, Exception) and id(next_one) not in seen:
        seen.add(id(next_one))
        yield next_one
        next_one = next_one.__cause__ or (None if next_one.__suppress_context__ else next_one.__context__)


def _is_of_network(error: BaseException) -> bool:
    if isinstance(error, TimeoutError | ConnectionError | socket.gaierror | ssl.SSLError):
        return True
    if isinstance(error, OSError) and error.errno in _NETWORK:
        return True
    return any(_NAMES.fullmatch(kind.__name__) for kind in type(error).__mro__)


def wait_said(headers: Mapping[str, str]) -> float | None:
    """How many seconds an answer says to wait; None if it does not. Names of headers in lower case."""
    if (wait := _number(headers.get("retry-after-ms"))) is not None:
        return wait / 1000
    if (after := headers.get("retry-after")) is not None:
        return _number(after) if _number(after) is not None else _until(after, headers.get("date"))
    resets = [
        duration(headers.get(f"x-ratelimit-reset-{kind}"))
        for kind in ("requests", "tokens")
        if _number(headers.get(f"x-ratelimit-remaining-{kind}")) == 0
    ]
    return max((reset for reset in resets if reset is not None), default=None)


def duration(text: str | None) -> float | None:
    """Seconds of `6m0s`, `1.5s`, `20ms` or `12`; None for anything else."""
    if (number := _number(text)) is not None:
        return number
    parts = _DURATION.findall(text or "")
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and re.fullmatch(r"\d+(\.\d+)?", text.strip()) else None


def _until(moment: str, now: str | None) -> float | None:
    """Between two dates of one answer: this machine's clock may be another."""
    try:
        wait = (parsedate_to_datetime(moment) - parsedate_to_datetime(now or "")).total_seconds()
    except (TypeError, ValueError):
        return None
    return max(0.0, wait)
