"""Models from elsewhere: the registry, what a forge offers, and how a model folder comes to be.

What is sent is not trusted: a model folder appears under its name only when all is well.
The way: a released name, URL, file or folder -> `obtain` -> digest -> `unpack` into a temporary
folder -> the caller's check of the model -> `source.json` and the final name.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from echofocus_core.base.archives import CHECKPOINTS, USED, table_name, unpack
from echofocus_core.base.checkpoints import WeightsError
from echofocus_core.base.console import PROGRAM, UserError, nearest, printable, some
from echofocus_core.base.download import (
    NotThere,
    fetch,
    file_name,
    one_line,
    open_url,
    plain_url,
    split_url,
)
from echofocus_core.base.files import atomic_path, clear_leftovers, sha256_file, temporary_path
from echofocus_core.base.regular import open_regular, read_regular

REGISTRY = Path(__file__).with_name("registry.json")
SOURCE = "source.json"  # in a downloaded model's folder: where it came from, and digests
MOST_JSON = 8 << 20
MOST_PAGES = 10  # of releases, 100 each


# -------------------------------------------------------------------------------------- registry


def plain_text(text):
    if not text.isprintable():
        raise ValueError("not printable text")
    return text


Text = Annotated[str, Field(max_length=2000), AfterValidator(plain_text)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Entry(BaseModel):
    """A released model in the registry. `api`: where its forge's API lists the releases."""

    model_config = ConfigDict(extra="forbid")
    about: Text
    url: Text
    api: Text = ""
    page: Text = ""
    sha256: Digest | None = None
    file: Literal[CHECKPOINTS]
    task: Text = ""
    labels: list[Text] = []
    names: dict[Text, Text] = {}
    recipe: dict[str, float | int] = {}
    licence: Text
    citation: Text


class Source(BaseModel):
    """A downloaded model's record; digests are those of its files as unpacked."""

    released: Text | None = None
    origin: Text = Field("", alias="from")
    release: Text = ""
    sha256: Digest | Literal[""] = ""
    sha256_was_known: bool = False
    licence: Text = ""
    citation: Text = ""
    files: dict[Text, Digest] = {}


class Asset(BaseModel):
    """A file of a release. `digest`: algorithm:hex, where the forge knows it."""

    name: Text
    url: Text = Field(alias="browser_download_url")
    size: int = 0
    digest: Text | None = None


class Release(BaseModel):
    tag: Text = Field("", alias="tag_name")
    title: Text | None = Field(None, alias="name")
    draft: bool = False
    prerelease: bool = False
    assets: list[Asset] = []


def parse(kind, data, what):
    """JSON of elsewhere as a pydantic type. Raises UserError with the first fault."""
    try:
        return TypeAdapter(kind).validate_json(data)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, fault["loc"]))
        reason = printable(f"{where}: {fault['msg']}" if where else fault["msg"])[:200]
        raise UserError(f"{what} cannot be used ({reason})") from error


def registry():
    """The released models: name to the fields of Entry that it gives, as a dict."""
    try:
        entries = parse(dict[str, Entry], read_regular(REGISTRY, MOST_JSON), REGISTRY.name)
    except FileNotFoundError:  # somebody emptied trained_models: own models work without
        return {}
    return {name: entry.model_dump(exclude_unset=True) for name, entry in entries.items()}


def read_source(folder):
    """What `source.json` of a downloaded model says; {} for any other folder."""
    what = f"{folder / SOURCE}, a download's record,"
    try:
        source = parse(Source, read_regular(folder / SOURCE, MOST_JSON), what)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except PermissionError:
        raise
    except (OSError, UserError) as error:
        said = f"{what} cannot be used ({error.strerror})" if isinstance(error, OSError) else error
        raise UserError(f"{said}; delete the folder and download the model again") from error
    return source.model_dump(exclude_unset=True, by_alias=True)


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
        with atomic_path(record) as temporary:
            temporary.write_text(f"{digest}  {path.name}\n")
        return
    with open_regular(record) as f:
        recorded = (f.read(1000).decode(errors="replace").split() or ["nothing"])[0]
    if recorded != digest:
        raise WeightsError(
            f"{path} has changed since it was first used: SHA-256 {digest}, recorded "
            f"{printable(recorded)[:64]}. Delete both files to download again."
        )


# ------------------------------------------------------------------------------------------- forge


def releases_of(api):
    """The releases of a repository that its forge's API lists, in its order: newest first."""
    url, found = f"{api}?per_page=100", []
    for _ in range(MOST_PAGES):
        with one_line(url), open_url(url, {"Accept": "application/vnd.github+json"}) as reply:
            data, links = reply.read(MOST_JSON), reply.headers.get("Link", "")
        found += parse(list[Release], data, f"the answer of {plain_url(url)}")
        following = re.search(r'<([^<>]+)>;\s*rel="next"', links)
        if not following:
            break
        url = following[1]
        if split_url(url)[:2] != split_url(api)[:2]:
            raise WeightsError(f"{plain_url(api)} gives its next page an unsafe address")
    for release in found:
        for asset in release.assets:
            if split_url(asset.url).scheme != split_url(api).scheme:
                raise WeightsError(f"release {release.tag} gives {asset.name} an unsafe address")
    return [release for release in found if not release.draft]


def find_assets(name, entries):
    """(release, its files that make the model `name`), as its forge lists them.

    By a name of the file or else of the release that fits this model and no other one of the
    registry, or else the one model file there is; of the newest release, final ones first.
    Raises WeightsError, with the addresses to choose from when several fit.
    """
    listed = sorted(releases_of(entries[name]["api"]), key=lambda release: release.prerelease)
    own, foreign = words(name, entries)

    def fits(text):
        return holds(text, own, all) and not holds(text, foreign, any)

    def neutral(text):  # of no model in particular, or of all
        return holds(text, own | foreign, all) or not holds(text, foreign, any)

    for way in (
        lambda release, asset: fits(asset.name),
        lambda release, asset: fits(f"{release.tag} {release.title}") and neutral(asset.name),
        lambda release, asset: neutral(f"{release.tag} {release.title} {asset.name}"),
    ):
        for release in listed:
            there = [asset for asset in release.assets if way(release, asset)]
            if assets := model_assets(name, release, there):
                return release, assets
    there = some([asset.name for release in listed for asset in release.assets], 20) or "no files"
    raise WeightsError(
        f"no release holds a .zip or .pt file that fits {name} (but {there}); name a file: python "
        f"echofocus.py download ADDRESS --model_name {name}"
    )


def holds(text, wanted, quantifier):
    return quantifier(word in text.casefold() for word in wanted)


def model_assets(name, release, assets):
    """The one model among some files of a release, and its tables; [] without. WeightsError."""
    models = [asset for asset in assets if asset.name.casefold().endswith((".zip", ".pt", ".pth"))]
    best = [asset for asset in models if asset.name.casefold().endswith(USED)]
    if len(models) > 1 and len(best) != 1:
        addresses = "".join(f"\n  {plain_url(asset.url)}" for asset in models[:20])
        raise WeightsError(
            f"release {release.tag} has several files that may be {name}; name one: python "
            f"echofocus.py download ADDRESS --model_name {name}{addresses}"
        )
    model = best or models
    if not model or model[0].name.casefold().endswith(".zip"):
        return model
    return model + [asset for asset in assets if table_name(asset.name)]


def words(name, entries):
    """The words of a model's name that tell it from the others of its repository, and theirs."""
    split = {
        other: set(re.findall("[a-z0-9]+", other.casefold()))
        for other, entry in entries.items()
        if entry.get("api") == entries[name]["api"]
    }
    common = set.intersection(*split.values()) if len(split) > 1 else set()
    return split[name] - common, set().union(*split.values()) - common - split[name]


# ----------------------------------------------------------------------------------------- install


@dataclass
class Obtained:
    """The files that a model is made of, fetched or the user's own; the model itself first."""

    files: list[tuple[Path, str]]  # where it lies, and its name in messages
    origin: str
    release: str = ""
    digests: list[str] = field(default_factory=list)  # that others know of the first


def install(source, models, name, sha256, check):
    """Make the model folder `models`/NAME of a released name, URL, zip, folder or .pt file.

    name: the folder's, '' for the source's own. sha256: the asset's, '' where the user does not
    know it. check: function of (folder, registry entry) that raises UserError for a model that
    cannot be used. Returns the folder, its record and the names of files that were not kept. A
    refusal leaves nothing behind; a dropped download goes on with the next call.
    """
    entries = registry()
    name = name or (source if source in entries else default_name(source, entries))
    if not re.fullmatch(r"\w[\w.+-]{0,99}", name):
        raise UserError(
            f"{printable(name)[:100]} cannot name a model folder; give another with --model_name"
        )
    folder, temporary = models / name, temporary_path(models / name)
    if folder.exists():
        raise UserError(f"{folder} exists; delete it, or take another name with --model_name")
    released_name = source if source in entries else name if name in entries else None
    entry = entries.get(released_name, {})
    own = words(released_name, entries)[0] if released_name else {name.casefold()}
    fetched = []
    clear_leftovers(models)
    try:
        obtained = obtain(source, entries, models, fetched)
        path, shown = obtained.files[0]
        known = [x.lower() for x in (sha256, *obtained.digests) if x]
        digest = checked_sha256(path, known, shown)
        temporary.mkdir(parents=True)
        others = []
        for path, shown in obtained.files:
            others += unpack(path, temporary, shown, lambda home: holds(home, own, all))
        try:
            check(temporary, entry)
        except UserError as error:
            raise WeightsError(str(error).replace(str(temporary), shown)) from error
        record = {"released": released_name, "from": obtained.origin}
        record |= {"release": obtained.release} if obtained.release else {}
        record |= {"sha256": digest, "sha256_was_known": bool(known)}
        record |= {key: entry[key] for key in ("licence", "citation") if key in entry}
        held = sorted(x.name for x in temporary.iterdir())
        record["files"] = {x: sha256_file(temporary / x) for x in held}
        (temporary / SOURCE).write_text(json.dumps(record, indent=2) + "\n")
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for path in fetched:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            models.rmdir()  # where it is empty
    return folder, record, others


def checked_sha256(path, known, shown):
    """A file's SHA-256, '' for a folder. Raises WeightsError when it is not as known."""
    digest = sha256_file(path) if path.is_file() else ""
    if wrong := [x for x in known if x != digest]:
        raise WeightsError(
            f"{shown} was refused: its SHA-256 is {digest or 'not defined'}, not {wrong[0]}"
        )
    return digest


def obtain(source, entries, models, fetched):
    """The files of a released model's name, a URL, or a file or folder of one's own.

    What is fetched lies in `models`, and its path is added to `fetched`. A released model whose
    file is not at the registry's address is looked for on its forge. Raises UserError.
    """
    entry = entries.get(source, {})
    if not entry and ("://" not in source or is_file_url(source)):
        path = local_asset(source, entries)
        return Obtained([(path, printable(path.name)[:100])], printable(path.name)[:100])
    pinned = [entry["sha256"]] if entry.get("sha256") else []
    url = entry.get("url", source)
    try:
        files = [fetch_asset(url, file_name(url), models, fetched)]
        return Obtained(files, plain_url(url), digests=pinned)
    except NotThere as missing:
        if not entry.get("api"):
            raise
        print(f"{plain_url(url)} is not there; asking {plain_url(entry['api'])} for its releases")
        try:
            release, assets = find_assets(source, entries)
        except UserError as error:
            raise WeightsError(f"{error} (releases: {entry.get('page', 'unknown')})") from missing
    names = some([asset.name for asset in assets], len(assets))
    print(f"taking {names} of release {release.tag}")
    files = [fetch_asset(asset.url, asset.name, models, fetched) for asset in assets]
    algorithm, _, digest = (assets[0].digest or "").partition(":")
    digests = pinned + ([digest] if algorithm == "sha256" else [])
    return Obtained(files, plain_url(assets[0].url), release.tag, digests)


def fetch_asset(url, name, models, fetched):
    """Fetch a URL into the folder `models`; returns its path and its name in messages."""
    plain_url(url)
    path = models / f".{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    fetched.append(path)
    return fetch(url, path), printable(name)[:100]


def default_name(source, entries):
    """The model's name by its URL or file: a released one's spelling where it is one."""
    path = PurePosixPath(split_url(source).path if "://" in source else Path(source).absolute())
    name = path.parent.name if path.name in CHECKPOINTS[:2] else path.name
    name = re.sub(r"\.(zip|pth?)$", "", name)
    return next((known for known in entries if known.casefold() == name.casefold()), name)


def is_file_url(source):
    return source.startswith("file:")


def local_asset(source, entries):
    name = urllib.request.url2pathname(urlsplit(source).path) if is_file_url(source) else source
    path = Path(name)
    if not path.exists():
        raise UserError(
            f"no released model, file or folder {source}{nearest(source, entries)} "
            f"({PROGRAM} download --list)"
        )
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{source} is no file or folder")
    return path
