"""Where and how the service is to run, checked before anything starts."""

import errno
import importlib.util
import ipaddress
import socket
from dataclasses import dataclass, field

from embeddings_pipeline.config.settings import Settings, revealed
from embeddings_pipeline.errors import ConfigurationError

LOOPBACK, PORT, AT_ONCE = "127.0.0.1", 8000, 64
PACKAGES = ("fastapi", "fastapi_offline", "mcp", "prometheus_client", "uvicorn")  # of the extra `serve`
WAITING_CONNECTIONS = 512


@dataclass(frozen=True)
class ServeOptions:
    """Where to listen, how many searches may be under way, and the key that requests must show, if any."""

    host: str = LOOPBACK
    port: int = PORT
    at_once: int = AT_ONCE
    key: str | None = field(default=None, repr=False)


def checked_options(host: str, port: int, at_once: int, settings: Settings) -> ServeOptions:
    """The options. ConfigurationError if a package is missing, the key cannot be sent, or the address wants one."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigurationError(
            f"the service needs more packages ({', '.join(missing)}): pip install 'embeddings-pipeline[serve]'"
        )
    key = _checked_key(revealed(settings.serve_api_key))
    if key is None and not _is_loopback(host):
        raise ConfigurationError(
            f"{host!r} is not this machine alone, and whoever reaches it could read every collection: set "
            f"SERVE_API_KEY, which each request must then show, or listen on {LOOPBACK}"
        )
    return ServeOptions(host, port, at_once, key)


def _checked_key(key: str | None) -> str | None:
    """The key, if a header can carry it as it is."""
    if key is None:
        return None
    if not key or key != key.strip() or not key.isprintable():
        raise ConfigurationError(
            "SERVE_API_KEY is blank, or has blanks at its ends, line ends or other characters that no header carries: "
            "choose letters and digits, as `openssl rand -hex 32` gives"
        )
    return key


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(options: ServeOptions) -> socket.socket:
    """A socket that listens there. ConfigurationError if another program does, or there is no such address."""
    host, port = options.host, options.port
    try:
        if not host.strip():
            raise OSError(errno.EADDRNOTAVAIL, "no address is named")
        [(family, kind, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listening = socket.socket(family, kind)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(options, error) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(WAITING_CONNECTIONS)
    except OSError as error:
        listening.close()
        raise _cannot_listen(options, error) from error
    return listening


def _cannot_listen(options: ServeOptions, error: OSError | UnicodeError) -> ConfigurationError:
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    remedy = "name an address of this machine with --host"
    if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES):
        remedy = f"choose another: `embeddings-pipeline serve --port {min(options.port + 1, 65535)}`"
    return ConfigurationError(f"port {options.port} on {options.host} cannot be used ({said}); {remedy}")
