"""Model files from elsewhere: the registry, downloads, archives, digests, safe reading.

What is sent is not trusted: an archive is judged before anything of it is written, a model file is
read without running its code, and a model folder appears under its name only when all is well.
The way: a released name, URL, file or folder -> `fetch` -> digest -> `unpack` into a temporary
folder -> the caller's check of the model -> `source.json` and the final name.
"""

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import stat
import tarfile
import urllib.error
import urllib.request
import zipfile
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import numpy as np
import torch

from common.console import UserError, nearest, progress
from common.files import sha256_file

REGISTRY = Path(__file__).resolve().parent.parent / "trained_models" / "registry.json"
SOURCE = "source.json"  # in a downloaded model's folder: where it came from, and digests
CHECKPOINTS = ("best_checkpoint.pt", "last_checkpoint.pt", "panecho.pt")
KEPT = (".csv", ".json", ".md", ".pdf", ".png", ".txt")  # beside checkpoints; nothing that runs
MOST_BYTES = 8 << 30  # of an asset, and of what it unpacks to; the released ones are below 1 GB
MOST_FILES = 1000
CHUNK = 1 << 20


class WeightsError(UserError):
    """A model file that cannot be had or used; the message names the file and the remedy."""


# -------------------------------------------------------------------------------------- registry


def registry():
    """The released models: name to url, sha256, file, task, labels, licence, citation, ..."""
    try:
        return json.loads(REGISTRY.read_text())
    except FileNotFoundError:  # somebody emptied trained_models: own models work without
        return {}
    except ValueError as error:
        raise UserError(f"{REGISTRY.name} is not valid JSON: {error}") from error


def read_source(folder):
    """What `source.json` of a downloaded model says; {} for any other folder."""
    try:
        source = json.loads((folder / SOURCE).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{folder / SOURCE} is not valid JSON: {error}") from error
    if not isinstance(source, dict) or not isinstance(source.get("files", {}), dict):
        raise UserError(f"{folder / SOURCE} is not a download's record; delete it")
    return source


def released(folder):
    """The registry entry that a model folder is, by its record or else its name; {} if none."""
    name = read_source(folder).get("released", folder.resolve().name)
    return registry().get(str(name), {})


def check_source(path):
    """Refuse a downloaded model's file that no longer has the digest recorded in source.json."""
    recorded = read_source(path.parent).get("files", {}).get(path.name)
    if recorded and path.is_file() and (digest := sha256_file(path)) != recorded:
        raise WeightsError(
            f"{path} has changed since it was downloaded: SHA-256 {digest}, recorded {recorded}. "
            f"Delete the folder and download again; if the change is yours, delete its {SOURCE}"
        )


def check_digest(path):
    """Compare a file with the digest recorded beside it; record it at first use."""
    record = path.with_name(path.name + ".sha256")
    digest = sha256_file(path)
    if not record.exists():
        record.write_text(f"{digest}  {path.name}\n")
    elif (recorded := (record.read_text().split() or ["nothing"])[0]) != digest:
        raise WeightsError(
            f"{path} has changed since it was first used: SHA-256 {digest}, recorded {recorded}. "
            "Delete both files to download again."
        )


# -------------------------------------------------------------------------------------- download


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, and never from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        schemes = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if schemes not in (("http", "http"), ("http", "https"), ("https", "https")):
            raise urllib.error.URLError(f"it redirects to {plain_url(newurl)}, which is not safe")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def plain_url(url):
    """A URL without user, password and query, which may hold secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def fetch(url, path, show=True):
    """Fetch an http(s) URL to `path`, resuming a partial download; returns the path.

    The file appears under its name only when complete. Raises WeightsError when the server cannot
    be reached or the connection drops; what came is kept and the next call goes on there, unless
    the server says (ETag) that its file is another one by now.
    """
    if not url.startswith(("http://", "https://")):
        raise WeightsError(f"{plain_url(url)} is no http or https address")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "ab") as f:
            with contextlib.suppress(OSError):  # not every disk has locks
                fcntl.flock(f, fcntl.LOCK_EX)  # workers that start together: one fetches
            if path.exists():
                return path
            etag_file = part.with_name(part.name + ".etag")
            receive(url, f, etag_file, f"download {path.name}", show)
            f.flush()
            os.fsync(f.fileno())
            os.replace(part, path)  # while it is locked
            etag_file.unlink(missing_ok=True)
            return path
    except WeightsError:  # too large
        part.unlink(missing_ok=True)
        raise
    except urllib.error.HTTPError as error:
        raise WeightsError(http_message(url, error)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        message = f"could not download {plain_url(url)}: {network_message(url, error)}"
        raise WeightsError(message) from error
    finally:
        if part.exists() and not part.stat().st_size:
            part.unlink()


def receive(url, f, etag_file, title, show):
    """Append what is missing of `url` to the open file `f`. Raises OSError and its kind."""
    start = f.seek(0, os.SEEK_END)
    headers = {"Range": f"bytes={start}-"} if start else {}
    if start and etag_file.exists():
        headers["If-Range"] = etag_file.read_text()
    request = urllib.request.Request(url, headers=headers)
    try:
        reply = urllib.request.build_opener(Redirects).open(request, timeout=60)
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
            etag_file.write_text(etag)
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


def check_bytes(n, what):
    if n > MOST_BYTES:
        raise WeightsError(f"{what} holds more than {MOST_BYTES >> 30} GB and was refused")


def file_name(source):
    """The last part of a URL's path or of a file's."""
    return PurePosixPath(urlsplit(source).path if "://" in source else source).name or "model"


def http_message(url, error):
    if error.code in (404, 410):
        return (
            f"{plain_url(url)} is not there (HTTP {error.code}); find the file's address on the "
            "release page, then: python echofocus.py download ADDRESS --model_name NAME"
        )
    return f"{plain_url(url)}: HTTP {error.code} {error.reason}; {by_hand(url)}"


def network_message(url, error):
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return (
            f"the server's certificate does not hold ({reason.verify_message}); behind a proxy set "
            f"SSL_CERT_FILE to its certificate, or {by_hand(url)}"
        )
    return f"{reason}; run the command again to resume, or {by_hand(url)}"


def by_hand(url):
    name = file_name(url)
    return f"fetch it on a machine with a network, then: python echofocus.py download ./{name}"


# -------------------------------------------------------------------------------------- archives


HEADER_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE)
HEADER_TYPES += (tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


class CheckedTarInfo(tarfile.TarInfo):
    """Headers that tarfile reads whole into memory (long names, pax) must be short."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        info = super().frombuf(buf, encoding, errors)
        if info.type in HEADER_TYPES and info.size > CHUNK:
            raise tarfile.ReadError("a header of more than 1 MB")
        return info


@contextlib.contextmanager
def open_members(asset):
    """Yields the members of a zip, tar, tar.gz, folder or model file, one at a time.

    A member is (name, bytes unpacked, kind, function that opens it); kind is 'file', 'folder' or
    what else it is.
    """
    if asset.is_dir():
        yield folder_members(asset)
    elif is_model_file(asset):
        yield [(model_file_name(asset), asset.stat().st_size, "file", partial(open, asset, "rb"))]
    elif is_zip(asset):
        with zipfile.ZipFile(asset) as archive:
            yield zip_members(archive)
    else:
        with open(asset, "rb") as f:
            start = f.read(512)
        if start.lstrip()[:1] == b"<":
            raise WeightsError("it is a web page: check the address")
        mode = "r:gz" if start[:2] == b"\x1f\x8b" else "r:"
        with tarfile.open(asset, mode, tarinfo=CheckedTarInfo) as archive:
            yield tar_members(archive)


def folder_members(folder):
    for path in sorted(folder.iterdir()):
        about = path.lstat()
        kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder"}
        kind = kinds.get(stat.S_IFMT(about.st_mode), "a link or device")
        yield path.name, about.st_size, kind, partial(open, path, "rb")


def zip_members(archive):
    for info in archive.infolist():
        form = stat.S_IFMT(info.external_attr >> 16)
        kind = "folder" if info.is_dir() else "file"
        if form not in (0, stat.S_IFREG, stat.S_IFDIR):
            kind = "a link or device"
        yield info.orig_filename, info.file_size, kind, partial(archive.open, info)


def tar_members(archive):
    for info in archive:
        kind = "file" if info.isreg() and not info.issparse() else "a link, device or sparse file"
        if info.isdir():
            kind = "folder"
        yield info.name, info.size, kind, partial(archive.extractfile, info)


def is_zip(path):
    """By its first bytes: zipfile.is_zipfile also takes a tar that ends with a model file."""
    with open(path, "rb") as f:
        return f.read(4) == b"PK\x03\x04"


def is_model_file(path):
    """Whether a file is what torch.save wrote: a zip around data.pkl, or an older bare pickle."""
    if is_zip(path):
        with zipfile.ZipFile(path) as f:
            return any(re.fullmatch(r"[^/]*/data\.pkl", name) for name in f.namelist())
    return path.suffix in (".pt", ".pth")


def model_file_name(path):
    saved = load_safely(path)
    return "panecho.pt" if isinstance(saved, dict) and "weights" in saved else CHECKPOINTS[0]


def checked_members(members, asset):
    """The files of an archive, as a list; everything that no honest archive holds is refused.

    Nothing is written before: not a path that leads elsewhere, a link, a device, two of a name,
    or more bytes or files than a model has.
    """
    files, names, total = [], set(), 0
    for name, size, kind, opener in members:
        parts = PurePosixPath(name).parts
        odd = name.startswith("/") or ".." in parts or ":" in name or "\\" in name
        if odd or not name.isprintable():
            raise WeightsError(f"{asset} was refused: {name!r} in it leads out of the folder")
        if kind == "folder":
            continue
        if kind != "file":
            raise WeightsError(f"{asset} was refused: {name!r} in it is {kind}")
        key = "/".join(parts).casefold()  # some disks take A and a for one name
        if key in names:
            raise WeightsError(f"{asset} was refused: it holds {name!r} twice")
        names.add(key)
        total += size
        check_bytes(total, asset)
        if len(names) > MOST_FILES:
            raise WeightsError(f"{asset} was refused: it holds more than {MOST_FILES} files")
        if parts[0] != "__MACOSX" and not parts[-1].startswith("."):
            files.append((PurePosixPath(*parts), size, opener))
    return files


def unpack(asset, folder, shown):
    """Write the model files of an asset into `folder`, flat; returns the names of the others.

    shown: the asset's name in messages. The model is the one folder in it that holds a checkpoint.
    Raises WeightsError.
    """
    try:
        with open_members(asset) as members:
            files = checked_members(members, shown)
            homes = sorted({str(path.parent) for path, *_ in files if path.name in CHECKPOINTS})
            if len(homes) != 1:
                held = ", ".join(homes or [str(path) for path, *_ in files[:5]]) or "nothing"
                wanted = "several models" if homes else f"no {CHECKPOINTS[0]}"
                raise WeightsError(f"{shown} was refused: it holds {wanted} (but {held})")
            others = []
            for path, size, opener in files:
                kept = path.name in CHECKPOINTS or path.suffix.lower() in KEPT
                if str(path.parent) != homes[0] or not kept or path.name == SOURCE:
                    others.append(str(path))
                    continue
                with opener() as incoming, open(folder / path.name, "xb") as out:
                    shutil.copyfileobj(incoming, out, CHUNK)
                    if out.tell() != size:
                        raise EOFError(f"{path} ends early")
                    out.flush()
                    os.fsync(out.fileno())
    except UserError:
        raise
    except Exception as error:  # whatever a damaged archive makes the readers raise
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise WeightsError(
            f"{shown} cannot be unpacked ({reason}): it is damaged, or no .zip, .tar, .tar.gz "
            "or .pt file; fetch it again"
        ) from error
    return others


# ----------------------------------------------------------------------------------------- install


def install(source, models, name, sha256, check):
    """Make the model folder `models`/NAME of a released name, URL, archive, folder or .pt file.

    name: the folder's, '' for the source's own. sha256: the asset's, '' where the user does not
    know it. check: function of (folder, registry entry) that raises UserError for a model that
    cannot be used. Returns the folder, its record and the names of files that were not kept. A
    refusal leaves nothing behind; a dropped download goes on with the next call.
    """
    asked = registry().get(source, {})
    name = name or (source if asked else default_name(source))
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"{name} cannot name a model folder; give another with --model_name")
    folder, temporary = models / name, models / f".{name}.{os.getpid()}.tmp"
    if folder.exists():
        raise UserError(f"{folder} exists; delete it, or take another name with --model_name")
    url = asked.get("url") or (source if "://" in source and not is_file_url(source) else "")
    shown = file_name(url or source)
    part = models / f".{hashlib.sha256(url.encode()).hexdigest()[:8]}-{shown}"
    asset = part if url else local_asset(source)
    released_name = source if asked else name if name in registry() else None
    entry = registry().get(released_name, {})
    try:
        if url:
            fetch_noted(url, asset, asked.get("note"))
        digest = sha256_file(asset) if asset.is_file() else ""
        known = [x.lower() for x in (sha256, asked.get("sha256")) if x]
        if wrong := [x for x in known if x != digest]:
            raise WeightsError(
                f"{shown} was refused: its SHA-256 is {digest or 'not defined'}, not {wrong[0]}"
            )
        temporary.mkdir(parents=True)
        others = unpack(asset, temporary, shown)
        try:
            check(temporary, entry)
        except UserError as error:
            raise WeightsError(str(error).replace(str(temporary), shown)) from error
        record = {"released": released_name, "from": plain_url(url) if url else shown}
        record |= {"sha256": digest, "sha256_was_known": bool(known)}
        record |= {key: entry[key] for key in ("licence", "citation") if key in entry}
        held = [x for x in CHECKPOINTS if (temporary / x).is_file()]
        record["files"] = {x: sha256_file(temporary / x) for x in held}
        (temporary / SOURCE).write_text(json.dumps(record, indent=2) + "\n")
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if url:
            asset.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            models.rmdir()  # where it is empty
    return folder, record, others


def fetch_noted(url, asset, note):
    try:
        fetch(url, asset)
    except WeightsError as error:
        raise WeightsError(f"{error} ({note})" if note else str(error)) from error


def default_name(source):
    """The model's name by its URL or file: a released one's spelling where it is one."""
    path = PurePosixPath(urlsplit(source).path if "://" in source else Path(source).absolute())
    name = path.parent.name if path.name in CHECKPOINTS[:2] else path.name
    name = re.sub(r"\.(zip|tar|tar\.gz|tgz|pth?)$", "", name)
    return next((known for known in registry() if known.casefold() == name.casefold()), name)


def is_file_url(source):
    return source.startswith("file:")


def local_asset(source):
    name = urllib.request.url2pathname(urlsplit(source).path) if is_file_url(source) else source
    path = Path(name)
    if not path.exists():
        raise UserError(
            f"no released model, file or folder {source}{nearest(source, registry())} "
            "(python echofocus.py download --list)"
        )
    return path


# ------------------------------------------------------------------------------------ safe reading


def safe_pickle_globals():
    """What a published checkpoint's pickle names beyond tensors: numpy arrays and scalars.

    numpy 1 spelt the module numpy.core. Nothing here can run code of the file.
    """
    import _codecs

    multiarray = np._core.multiarray
    allowed = [np.ndarray, np.dtype, np.dtypes.UInt32DType, np.dtypes.Float64DType]
    allowed += [np.dtypes.Float32DType, np.dtypes.Int64DType, (_codecs.encode, "_codecs.encode")]
    for name in ("_reconstruct", "scalar"):
        for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
            allowed.append((getattr(multiarray, name), f"{module}.{name}"))
    return allowed


def load_safely(path):
    """What torch.save wrote, read without running anything in it.

    Raises WeightsError, naming what a refused file would have imported. Records that are larger
    than the file are a bomb: torch.save compresses nothing.
    """
    if path.is_file() and is_zip(path) and unpacked_bytes(path) > path.stat().st_size:
        raise WeightsError(f"{path} was refused: it unpacks to more bytes than it has")
    with torch.serialization.safe_globals(safe_pickle_globals()):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise WeightsError(f"no checkpoint {path}") from error
        except Exception as error:  # whatever a file that is no checkpoint makes the reader raise
            detail = "damaged, or not a checkpoint at all"
            if named := foreign_globals(path, error):
                detail = f"it names {', '.join(named)}, which no model needs"
            raise WeightsError(f"{path} cannot be read safely and was refused: {detail}") from error


def unpacked_bytes(path):
    try:
        with zipfile.ZipFile(path) as f:
            return sum(info.file_size for info in f.infolist())
    except zipfile.BadZipFile:
        return 0  # torch says what is wrong with it


def foreign_globals(path, error):
    """The functions and classes that a refused file names beyond those allowed, five at most."""
    try:
        named = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not in torch's zip format, or damaged: what the reader stopped at
        named = re.findall(r"GLOBAL ([\w.]+)", str(error))
    return list(dict.fromkeys(name for name in named if name.isprintable()))[:5]


def load_strictly(model, state, path, kind):
    """Load `state` into `model`, made on the meta device; float32 whatever the file has.

    Raises WeightsError for every missing, unexpected or misshapen name, for what is no plain
    tensor of floating-point numbers, and for numbers that are not finite.
    """
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    given = {k: describe(v) for k, v in state.items()}
    wrong = [f"missing {k}" for k in own if k not in given]
    wrong += [f"unexpected {ascii(str(k))[1:-1][:60]}" for k in given if k not in own]
    wrong += [f"{k} is {given[k]}, not {own[k]}" for k in own if k in given and own[k] != given[k]]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise WeightsError(f"{path} does not fit {kind}: {'; '.join(wrong[:5])}{more}")
    model.load_state_dict({k: v.detach().to(torch.float32) for k, v in state.items()}, assign=True)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise WeightsError(
                f"{path} holds NaN or infinite weights ({name}): damaged, or of a training that "
                "diverged; nothing can be predicted with it"
            )


def describe(value):
    """The shape of a plain tensor of floating-point numbers; of anything else what it is."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
    if not plain or not value.is_floating_point():
        return f"a tensor of {value.dtype} on {value.device.type}, {value.layout}"
    return tuple(value.shape)
