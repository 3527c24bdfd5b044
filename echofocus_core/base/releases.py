"""Released models: the registry, and installing a download as a model folder.

A released name, URL, zip, folder or .pt file -> digest -> the files of the model, in a temporary
folder -> the caller's check of the model -> `source.json` and the final name.
"""

import json
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from echofocus_core.base.checkpoints import WeightsError, load_safely
from echofocus_core.base.console import PROGRAM, UserError, nearest, some
from echofocus_core.base.download import fetch, name_in_url, plain_url
from echofocus_core.base.files import atomic_path, sha256_file

REGISTRY = Path(__file__).with_name("registry.json")
SOURCE = "source.json"  # in a downloaded model's folder: its origin and the digests of its files
CHECKPOINTS = ("best_checkpoint.pt", "last_checkpoint.pt", "panecho.pt")
USED = (CHECKPOINTS[0], CHECKPOINTS[2])  # a model folder has one of them
KEPT = (*CHECKPOINTS, "train_args.csv", "train_losses.csv", "split.csv", "run.json")
TEXTS = re.compile(r"(README|LICEN[SC]E|NOTICE|CITATION)[\w-]*(\.(md|txt|cff))?", re.IGNORECASE)
MOST_BYTES = 8 << 30  # per file in an archive; released models are below 1 GB


def registry():
    """The released models: {name: address, digest (null: not available), labels, licence, ...}."""
    return json.loads(REGISTRY.read_text())


def read_source(folder):
    """The content of `source.json` in a downloaded model's folder; {} for any other folder."""
    path = Path(folder) / SOURCE
    return json.loads(path.read_text()) if path.is_file() else {}


NOT_VERIFIED = "not verified to be the release"


def rights(entry):
    """The licence and citation of a registry entry; for {}, that they are not verified."""
    if not entry:
        return {"licence": NOT_VERIFIED}
    return {key: entry[key] for key in ("licence", "citation") if key in entry}


def registry_entry(folder):
    """The registry entry of a model folder, by its record, or else by its name; {} if missing."""
    name = read_source(folder).get("released", folder.resolve().name)
    return registry().get(str(name), {})


def check_source(path):
    """Refuse a file of a downloaded model if its digest differs from the one in source.json."""
    recorded = read_source(path.parent).get("files", {}).get(path.name)
    if recorded and path.is_file() and (digest := sha256_file(path)) != recorded:
        raise WeightsError(
            f"{path} has changed since it was downloaded: SHA-256 {digest}, recorded {recorded}. "
            f"Delete the folder and download again; if you changed the file, delete {SOURCE}"
        )


def check_digest(path):
    """Compare a file with the digest recorded next to it; record the digest at first use."""
    record, digest = path.with_name(path.name + ".sha256"), sha256_file(path)
    if not record.exists():
        with atomic_path(record) as temporary:
            temporary.write_text(f"{digest}  {path.name}\n")
    elif not record.read_text(errors="replace").startswith(digest):
        raise WeightsError(
            f"{path} has changed since it was first used: SHA-256 {digest} differs from {record}. "
            "Delete both files to download again"
        )


# ----------------------------------------------------------------------------------------- install


def install(source, models, name, sha256, check):
    """Install a released name, URL, zip, folder or .pt file as the model folder `models`/NAME.

    name: of the folder, '' for the name of the source. sha256: the user's digest of the download,
    or ''. check: function of (folder, registry entry) that raises UserError for an unusable model.
    Returns the folder, its record and the names of files that were not copied. If the model is
    refused, no file remains.
    """
    entries = registry()
    name = name or default_name(source, entries)
    if not re.fullmatch(r"\w[\w.+-]{0,99}", name):
        raise UserError(f"{name[:100]} is not a valid folder name; choose one with --model_name")
    folder = models / name
    if folder.exists():
        raise UserError(f"{folder} exists; delete it, or choose another name with --model_name")
    released_name = source if source in entries else name if name in entries else None
    entry = entries.get(released_name, {})
    pinned = entries.get(source, {}).get("sha256")
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=models) as place:
        asset, origin = obtain(source, entries, Path(place, "asset"))
        digest = sha256_file(asset) if asset.is_file() else ""
        if other := {sha256.lower(), pinned} - {digest, "", None}:
            raise WeightsError(
                f"{asset.name} was refused: its SHA-256 is {digest or 'not defined'}, not "
                f"{min(other)}"
            )
        model = Path(place, "model")
        model.mkdir()
        others = unpack(asset, model, name)
        try:
            check(model, entry)
        except UserError as error:
            raise WeightsError(str(error).replace(str(model), asset.name)) from error
        record = {"released": released_name, "from": origin, "sha256": digest}
        record["sha256_was_known"] = bool(sha256 or pinned)
        if released_name:  # a registry without a digest trusts the release's own address
            expected = entry.get("sha256")
            record |= rights(entry if source == released_name or expected == digest else {})
        record["files"] = {path.name: sha256_file(path) for path in sorted(model.iterdir())}
        (model / SOURCE).write_text(json.dumps(record, indent=2) + "\n")
        os.rename(model, folder)
    return folder, record, others


def default_name(source, entries):
    """The model's name from its URL or file, spelled as in the registry."""
    path = PurePosixPath(plain_url(source) if "://" in source else Path(source).absolute())
    name = path.parent.name if path.name in CHECKPOINTS[:2] else path.name
    name = re.sub(r"\.(zip|pth?)$", "", name)
    return next((other for other in entries if other.casefold() == name.casefold()), name)


def obtain(source, entries, place):
    """(file or folder, origin as text) of a released name, a URL, or a local path.

    Downloads go into the folder `place`. Raises UserError.
    """
    entry = entries.get(source)
    if not entry and "://" not in source:
        if not Path(source).exists():
            raise UserError(
                f"no released model, file or folder {source}{nearest(source, entries)} "
                f"({PROGRAM} download --list)"
            )
        return Path(source), Path(source).name
    url = entry["url"] if entry else source
    path = place / name_in_url(url)[:100]
    try:
        fetch(url, path)
    except WeightsError as error:
        if not entry:
            raise
        raise WeightsError(
            f"{error}. If the file has moved, find its address on {entry['page']}, then: "
            f"{PROGRAM} download ADDRESS --model_name {source}"
        ) from error
    return path, plain_url(url)


# ------------------------------------------------------------------------------------------ unpack


def unpack(asset, folder, name):
    """Copy the files of the model `name` from an asset into `folder`; returns the other names.

    asset: a .pt file, a folder, or a zip with one folder per model. Only files with the names of
    model files are read. Raises WeightsError.
    """
    try:
        if asset.is_dir():
            paths = {str(path.relative_to(asset)): path for path in sorted(asset.iterdir())}
            return copy_files(paths, lambda member: open(paths[member], "rb"), folder, name)
        if not zipfile.is_zipfile(asset) or is_checkpoint(asset):
            saved = load_safely(asset)
            encoder = isinstance(saved, dict) and "weights" in saved
            shutil.copyfile(asset, folder / USED[encoder])
            return []
        with zipfile.ZipFile(asset) as archive:
            for info in archive.infolist():
                if info.file_size > MOST_BYTES:
                    raise WeightsError(f"{info.filename} has more than {MOST_BYTES >> 30} GB")
            return copy_files(archive.namelist(), archive.open, folder, name)
    except WeightsError as error:
        message = str(error).replace(str(asset), asset.name)
        raise WeightsError(f"{asset.name} was refused: {message}") from error
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise WeightsError(
            f"{asset.name} cannot be unpacked ({error}): it is damaged; fetch it again"
        ) from error


def is_checkpoint(path):
    """Whether a zip file was written by torch.save."""
    with zipfile.ZipFile(path) as archive:
        return any(re.fullmatch("[^/]*/data.pkl", member) for member in archive.namelist())


def copy_files(members, open_member, folder, name):
    """Copy the model's files among `members` (paths with /) to `folder`; returns the others."""
    homes = sorted({PurePosixPath(x).parent for x in members if PurePosixPath(x).name in USED})
    if len(homes) > 1:
        homes = [home for home in homes if home.name.casefold() == name.casefold()] or homes
    if len(homes) != 1:
        what = f"several models; name one of {some(map(str, homes))}" if homes else f"no {USED[0]}"
        raise WeightsError(f"it contains {what} (files: {some(members, 5) or 'none'})")
    others = []
    for member in members:
        path = PurePosixPath(member)
        if path.parent == homes[0] and (path.name in KEPT or TEXTS.fullmatch(path.name)):
            with open_member(member) as incoming, open(folder / path.name, "xb") as out:
                shutil.copyfileobj(incoming, out)
        elif not member.endswith("/") and not path.name.startswith("."):
            others.append(member)
    return others
