"""Runs PostgreSQL and stops it when the last process that uses it has gone. A script; `embedded_server` starts it.

It inherits two files. `lease` carries a shared flock of every process that uses the server, `guard` an exclusive one
that this process and all of PostgreSQL's own hold. The kernel drops a flock when its last holder is gone, however it
went, so that neither SIGKILL nor a number used again by another process can mislead anybody:
the exclusive lock on `lease` is to be had when nobody uses the server, that on `guard` when nothing of it runs.
"""

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys

STOP_SECONDS = 60  # a fast shutdown writes a checkpoint; after this long the server is made to go without
PR_SET_PDEATHSIG = 1


class _ServerGone(Exception):
    pass


class _Terminated(Exception):
    pass


def _raise(error: type[Exception]) -> None:
    raise error


def main(lease: int, guard: int, command: list[str], user: list[int] | None, folder: str) -> int:
    """Run `command` as `user` ([uid, gid], or None: as we are) until nobody holds `lease`."""
    if os.fork():  # leave the family of the process that happened to be first: what ends its children spares us
        os._exit(0)
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None

    def stop_with_supervisor() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGINT)

    signal.signal(signal.SIGTERM, lambda *_: _raise(_Terminated))
    signal.signal(signal.SIGINT, lambda *_: _raise(_Terminated))
    try:
        server = subprocess.Popen(
            command,
            cwd=folder,
            env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
            stdin=subprocess.DEVNULL,
            pass_fds=(guard,),
            process_group=0,
            preexec_fn=stop_with_supervisor,  # noqa: PLW1509 - there are no threads here
            user=user[0] if user else None,
            group=user[1] if user else None,
            extra_groups=[] if user else None,
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"FATAL:  {command[0]} cannot be run: {error}", file=sys.stderr)
        return 1
    try:
        signal.signal(signal.SIGCHLD, lambda *_: _raise(_ServerGone))
        if server.poll() is not None:
            return 1
        fcntl.flock(lease, fcntl.LOCK_EX)
    except _ServerGone:
        return 1
    except _Terminated:
        pass
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for how, seconds in ((signal.SIGINT, STOP_SECONDS), (signal.SIGQUIT, 10), (signal.SIGKILL, 10)):
        server.send_signal(how)
        try:
            server.wait(seconds)
            break
        except subprocess.TimeoutExpired:
            continue
    return 0


if __name__ == "__main__":
    sys.exit(main(**json.loads(sys.argv[1])))
