"""Download a file by http or https."""

import http.client
import os
import socket
import ssl
import urllib.request
from urllib.error import HTTPError

from echofocus_core.base.checkpoints import WeightsError
from echofocus_core.base.console import PROGRAM, progress
from echofocus_core.base.files import atomic_path, lock


def plain_url(url):
    """A URL without its query, which may hold a password."""
    return url.partition("?")[0]


def name_in_url(url):
    """The last part of the path of a URL or file."""
    return os.path.basename(plain_url(url).rstrip("/")) or "model"


def fetch(url, path):
    """Download a URL to `path` unless it exists; several processes may request the same file.

    The file appears when it is complete. Raises WeightsError.
    """
    if not url.startswith(("http://", "https://")):
        raise WeightsError(f"{plain_url(url)} is not an http or https address")
    with lock(path):
        if path.exists():
            return
        try:
            receive(url, path)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise WeightsError(
                f"could not download {plain_url(url)}: {connection_fault(error)}; check the "
                "network and run the command again, or fetch the file on another machine, then: "
                f"{PROGRAM} download ./{name_in_url(url)}"
            ) from error


def connection_fault(error):
    """The reason of a failed download, as a phrase."""
    reason = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return (
            f"the server's certificate is not trusted ({reason.verify_message}); if your network "
            "has a proxy with its own certificate, set SSL_CERT_FILE to that file"
        )
    if isinstance(reason, socket.gaierror):
        return "the server's name cannot be resolved"
    return getattr(reason, "strerror", None) or str(reason)


def receive(url, path):
    """Write the reply of a URL to `path` atomically. Raises what urllib raises."""
    with urllib.request.urlopen(url, timeout=60) as reply, atomic_path(path) as temporary:
        if url.startswith("https:") and not reply.url.startswith("https:"):
            raise OSError(f"it redirects to {plain_url(reply.url)}, which is not encrypted")
        size = int(reply.headers.get("Content-Length") or 0)
        title = f"download {name_in_url(url)[:60]}"
        bar = progress(desc=title, total=size or None, unit="B", unit_scale=True)
        with open(temporary, "wb") as f, bar:
            while chunk := reply.read(1 << 20):
                bar.update(f.write(chunk))
        if temporary.stat().st_size < size:
            raise OSError(f"the connection ended before the last of {size} bytes")
