"""Downloads: addresses that anybody may have typed, servers that may say anything."""

import contextlib
import http.client
import os
import re
import secrets
import ssl
import time
import urllib.error
import urllib.request
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from echofocus_core.base.checkpoints import CHUNK, WeightsError, check_bytes
from echofocus_core.base.console import PROGRAM, UserError, printable, progress
from echofocus_core.base.files import atomic_path, lock, open_to_add


class NotThere(WeightsError):
    """The server knows no such file."""


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, and never from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        schemes = split_url(req.full_url).scheme, split_url(newurl).scheme
        if schemes not in (("http", "http"), ("http", "https"), ("https", "https")):
            raise urllib.error.URLError(f"it redirects to {plain_url(newurl)}, which is not safe")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def split_url(url):
    """urlsplit, for what anybody may have typed. Raises WeightsError."""
    named = "@" in url  # until its parts are known: a password may have been taken for a port
    try:
        parts = urlsplit(url)
        _ = parts.port  # its number is looked at here and nowhere else
        named = "@" in parts.netloc
        if named or re.search(r"[^!-~]", url):
            raise ValueError("spaces and letters beyond ASCII are written as %20 and the like")
    except ValueError as error:
        if named:  # what stands before the @ is not shown
            raise WeightsError(
                "the address cannot be used: user names and passwords in one are not sent; fetch "
                f"the file by other means, then: {PROGRAM} download ./FILE"
            ) from None
        start = ascii(url.partition("?")[0])[1:-1][:100]
        raise WeightsError(f"{start} is no address ({printable(error)[:100]})") from error
    return parts


def plain_url(url):
    """A URL without its query, which may hold secrets."""
    parts = split_url(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


def file_name(source):
    """The last part of a URL's path or of a file's."""
    return PurePosixPath(split_url(source).path if "://" in source else source).name or "model"


def open_url(url, headers):
    """The server's reply to a GET. Raises WeightsError, OSError and their kind."""
    if not url.startswith(("http://", "https://")):
        raise WeightsError(f"{plain_url(url)} is no http or https address")
    split_url(url)
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.build_opener(Redirects).open(request, timeout=60)


@contextlib.contextmanager
def one_line(url):
    """What goes wrong with a server and a network becomes a WeightsError with its remedy."""
    try:
        yield
    except UserError:
        raise
    except urllib.error.HTTPError as error:
        kind = NotThere if error.code in (404, 410) else WeightsError
        raise kind(http_message(url, error)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        message = f"could not download {plain_url(url)}: {network_message(url, error)}"
        raise WeightsError(message) from error


def http_message(url, error):
    if error.code in (404, 410):
        return (
            f"{plain_url(url)} is not there (HTTP {error.code}); find the file's address on the "
            f"release page, then: {PROGRAM} download ADDRESS --model_name NAME"
        )
    headers = error.headers or {}
    if error.code == 429 or headers.get("X-RateLimit-Remaining") == "0":
        return (
            f"{plain_url(url)} answers no more questions from here"
            f"{until(headers.get('X-RateLimit-Reset', ''))} (HTTP {error.code}, rate limit); try "
            f"again then, or {by_hand(url)}"
        )
    reason = printable(error.reason)[:100]
    return f"{plain_url(url)}: HTTP {error.code} {reason}; {by_hand(url)}"


def until(seconds):
    """A server's time of day, by its seconds since 1970; '' where it gives none."""
    if not re.fullmatch("[0-9]{1,11}", seconds):
        return ""
    return time.strftime(" until %H:%M", time.localtime(int(seconds)))


def network_message(url, error):
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return (
            f"the server's certificate does not hold ({reason.verify_message}); behind a proxy set "
            f"SSL_CERT_FILE to its certificate, or {by_hand(url)}"
        )
    return f"{printable(reason)[:200]}; run the command again to resume, or {by_hand(url)}"


def by_hand(url):
    name = printable(file_name(url))[:100]
    return f"fetch it on a machine with a network, then: {PROGRAM} download ./{name}"


# -------------------------------------------------------------------------------------- download


def fetch(url, path, show=True):
    """Fetch an http(s) URL to `path`, resuming a partial download; returns the path.

    The file appears under its name only when complete. Raises WeightsError when the server cannot
    be reached or the connection drops; what came is kept and the next call goes on there, unless
    the server says (ETag) that its file is another one by now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_line(url), alone(path) as part:
        if path.exists():  # another worker fetched it meanwhile
            return path
        etag_file = part.with_name(part.name + ".etag")
        try:
            with open_to_add(part) as f:
                receive(url, f, etag_file, f"download {file_name(url)[:60]}", show)
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, path)
            etag_file.unlink(missing_ok=True)
        except WeightsError:  # too large
            part.unlink(missing_ok=True)
            raise
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()
                etag_file.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def alone(path):
    """Yields the file to collect a download in, while no other worker collects it.

    Where locks fail, a file of this process's own, which nothing resumes.
    """
    part = path.with_name(path.name + ".part")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock(path))
        except OSError as error:
            print(f"this disk gives no lock ({error.strerror}): downloading without one")
            part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        yield part


def receive(url, f, etag_file, title, show):
    """Append what is missing of `url` to the open file `f`. Raises OSError and its kind."""
    start = f.seek(0, os.SEEK_END)
    headers = {"Range": f"bytes={start}-"} if start else {}
    if start and etag_file.exists():
        headers["If-Range"] = etag_file.read_text()
    try:
        reply = open_url(url, headers)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        f.truncate(f.seek(0))  # nothing lies beyond what we have: perhaps another file, so anew
        return receive(url, f, etag_file, title, show)
    with reply:
        said = reply.headers.get("Content-Range", f"bytes {start}-")
        if start and reply.status == 206 and not said.startswith(f"bytes {start}-"):
            f.truncate(f.seek(0))  # not the part that was asked for: begin anew
            return receive(url, f, etag_file, title, show)
        if start and reply.status != 206:  # the range was ignored, or the file is another one
            start = 0
            f.truncate(f.seek(0))
        if (etag := reply.headers.get("ETag", "")).startswith('"'):
            with atomic_path(etag_file) as temporary:
                temporary.write_text(etag)
        else:
            etag_file.unlink(missing_ok=True)
        expected = start + int(reply.headers.get("Content-Length") or 0)
        check_bytes(expected, plain_url(url))
        bar = progress(
            desc=title, initial=start, total=expected or None, unit="B", unit_scale=True,
            disable=not show,
        )  # fmt: skip
        with bar:
            while chunk := reply.read(CHUNK):
                f.write(chunk)
                bar.update(len(chunk))
                check_bytes(f.tell(), plain_url(url))
    if reply.headers.get("Content-Length") and f.tell() < expected:
        raise ConnectionError(f"it stopped at {f.tell()} of {expected} bytes")
