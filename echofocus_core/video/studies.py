"""Group videos into studies by DICOM header, folder or list; the shards of workers.

    files below the source -> their header facts -> groups of files -> a name each -> Study

Headers take precedence over folders, since a CD, a folder per day or an archive's export can hold
several patients.
"""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from echofocus_core.base.console import Findings, UserError, nearest, progress, some
from echofocus_core.base.tables import read_table
from echofocus_core.base.world import from_environment, rank_and_size
from echofocus_core.video.decode import DICOM_SUFFIXES, VIDEO_SUFFIXES, first_picture
from echofocus_core.video.dicom import group_stills, is_dicom, read_header_facts, short_digest
from echofocus_core.video.errors import why_packed

LISTED = 20  # names on one line of the screen
HEADER_READERS = 16  # threads; over a network, most of the time is waiting
LONGEST_NAME = 200  # bytes of a study's name; file systems allow 255, with an ending
UNNAMED = {"dicom", "dicoms", "dcm", "image", "images"}  # folder names that do not name a study
# Folders and files of storage systems, archives and desktops, in addition to those with a dot.
SYSTEM = {"@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot",
          "$recycle.bin", "recycler", "recycled", "system volume information", "lost+found",
          "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini"}  # fmt: skip
ECHONET_PEDIATRIC = re.compile(r"^([^-]+-[^-]+)-[^-]+$")  # <patient>-<accession>-<n>


@dataclass
class Study:
    """A study's videos, as POSIX paths relative to its folder, spelled as on disk."""

    name: str
    folder: Path
    videos: list[str]
    left_out: dict[str, str] = field(default_factory=dict)  # file -> why it is not read
    series: dict[str, list[str]] = field(default_factory=dict)  # video -> its single-frame files
    names_patient: str = ""  # what has the PatientID or PatientName of its files: study, videos

    def source(self, video):
        """The path of a video, or the list of its frames' paths: what `read_clips` takes."""
        if video in self.series:
            return [self.folder / file for file in self.series[video]]
        return self.folder / video


@dataclass
class Group:
    """Files of one study, as POSIX paths relative to the source."""

    files: list[str]
    uid: str = ""  # their StudyInstanceUID, if no other group has it
    shared_uid: str = ""  # their StudyInstanceUID, if other groups have it too
    folder: str = ""  # that contains them; without a UID, the first below the source


def find_studies(
    source, group="dicom", manifests=(), study_id="folder", listener=None, leave_out=None
):
    """The studies of a source, sorted by name.

    group: 'dicom' groups files by StudyInstanceUID, whatever folders they are in, and by folder if
    they have none; 'folder' takes each subfolder of `source` with all files below it as a study, or
    `source` itself if it has no subfolders; 'one' takes `source` as one study. manifests: tables
    that list studies instead, see `read_manifest`. study_id: see `name_groups`. leave_out: a folder
    that is not searched, such as the one for the outputs. Decisions and ignored files are reported
    to the listener; in a run, it raises errors as UserError.
    """
    source, listener = Path(source), listener or Findings()
    if not source.is_dir():
        listener.error(f"{source} is not a folder", "give a study's folder or a folder of them")
        return []
    if manifests:
        if study_id != "folder":
            listener.error("--study_id has no effect on a manifest, which names its studies itself")
        return studies_of_manifests(source, manifests, listener)
    files, notes = find_videos(source, leave_out)
    if not files:
        text = "".join(f"; {note}" for note in notes)
        listener.error(f"no video or DICOM file in {source} or below it{text}")
        return []
    for note in notes:
        listener.note(note)
    facts = read_facts(source, files)
    if group == "dicom":
        groups = group_by_header(source, files, facts, listener)
    else:
        groups = [Group(files, folder=".")]
        if group == "folder":
            groups = group_by_folder(source, files, listener)
        refuse_several(source, groups, facts, listener)
    groups = [g for g in groups if has_one_patient(g.files, facts, listener)]
    names = name_groups(source, groups, study_id, listener)
    studies = [study_of(n, source, g, facts) for n, g in zip(names, groups, strict=True)]
    warn_of_names(studies, [[facts[f] for f in g.files] for g in groups], listener)
    if not studies:
        listener.error(f"no study in {source} can be used", "see above")
    return sorted(studies, key=lambda study: study.name)


def study_of(name, source, group, facts):
    """The Study of a Group, with each DICOM object once."""
    below = PurePosixPath(group.folder)
    repeats = find_repeats(source, group.files, facts)
    facts = {str(PurePosixPath(f).relative_to(below)): facts[f] for f in group.files}
    repeats = {str(PurePosixPath(f).relative_to(below)): why for f, why in repeats.items()}
    series = group_stills(facts)
    frames = {file for files in series.values() for file in files}
    videos = sorted((facts.keys() - frames - repeats.keys()) | series.keys())
    return Study(name, source / below, videos, repeats, series)


def find_repeats(source, files, facts):
    """Copies of one DICOM object, by SOPInstanceUID and first frame: {file: why it is left out}.

    The best copy is kept: lossless before lossy, then the one with most frames. Some programs give
    all their files one SOPInstanceUID, so the first frames are compared: at 64 x 64 pixels, JPEG of
    quality 50 changes a cine by 0.034 of its contrast at most, while phantom loops of one heart and
    view differ by 0.2 or more.
    """
    objects, repeats = {}, {}
    for file in files:
        if facts[file].sop_uid and facts[file].n_frames > 1:
            objects.setdefault(facts[file].sop_uid, []).append(file)
    for copies in (copies for copies in objects.values() if len(copies) > 1):
        copies.sort(key=lambda f: (facts[f].lossy, -facts[f].n_frames, f.count("/"), f))
        pictures = {}  # of the kept files
        for file in copies:
            picture = first_picture(source / file)
            if picture is None:  # it is skipped later, with a reason
                continue
            first = next((f for f, other in pictures.items() if are_alike(picture, other)), "")
            if first:
                repeats[file] = f"a repeat: the same SOPInstanceUID as {visible(first)}"
            else:
                pictures[file] = picture
    return repeats


def are_alike(picture, other):
    """Whether two images differ by less than a tenth of their contrast."""
    return np.abs(picture.astype(float) - other).mean() <= 0.1 * max(picture.std(), other.std(), 1)


def common_folder(files):
    return os.path.commonpath([f"/{PurePosixPath(f).parent}" for f in files])[1:] or "."


# ----------------------------------------------------------------------------------- find the files


def find_videos(folder, leave_out=None):
    """(Sorted POSIX paths of candidate files, relative to `folder`; notes for the user).

    Links to folders are followed; hidden files and system files are ignored.
    """
    videos, others, packed, unreadable, top = [], Counter(), [], [], []
    ancestors = {}  # a folder's path -> the real paths of itself and of the folders above it
    left_out = {os.path.realpath(leave_out)} if leave_out else set()

    def note_error(error):
        name = Path(error.filename).relative_to(folder).as_posix()
        unreadable.append(f"{visible(name)}: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=note_error, followlinks=True):
        ancestors[parent] = {os.path.realpath(parent)} | ancestors.get(
            os.path.dirname(parent), set()
        )
        closed = ancestors[parent] | left_out  # a link to a folder above it would never end
        folders[:] = sorted(
            name
            for name in folders
            if not is_hidden(name) and os.path.realpath(Path(parent, name)) not in closed
        )
        if Path(parent) == folder:
            top = list(folders)
        for path in (Path(parent, n) for n in sorted(names) if not is_hidden(n)):
            if not path.is_file():
                others["not a regular file"] += 1
            elif path.name.upper() != "DICOMDIR" and is_candidate(path):
                videos.append(path.relative_to(folder).as_posix())
            elif reason := why_packed(path):
                packed.append(f"{visible(path.relative_to(folder).as_posix())}: {reason}")
            else:
                others[visible(path.suffix.lower()) or "no ending"] += 1
    notes = []
    if packed:
        notes.append(f"{len(packed)} files are packed and not read: {some(packed, LISTED)}")
    if unreadable:
        notes.append(f"{len(unreadable)} subfolders cannot be read: {some(unreadable, LISTED)}")
    if others:
        kinds = ", ".join(f"{kind} {n}" for kind, n in others.most_common(LISTED))
        notes.append(f"{others.total()} files are not videos: {kinds}")
    empty = sorted(set(top) - {video.split("/")[0] for video in videos})
    if 0 < len(empty) < len(top):
        notes.append(f"{len(empty)} folders hold no video: {some(map(visible, empty), LISTED)}")
    return sorted(videos), notes


def is_hidden(name):
    return name.startswith(".") or name.lower() in SYSTEM


def is_candidate(path):
    """Whether a file should be tried as a video: by its ending, or DICOM under any name."""
    suffix = path.suffix.lower()
    return suffix in VIDEO_SUFFIXES | DICOM_SUFFIXES or is_dicom(path)


def read_facts(source, files):
    """The HeaderFacts of all files, a dict; headers are read once, up to the pixels."""
    with ThreadPoolExecutor(HEADER_READERS) as pool:
        facts = pool.map(lambda f: read_header_facts(source / f), files)
        options = {"unit": "file", "total": len(files), "delay": 2}
        return dict(zip(files, progress(facts, desc="headers", **options), strict=True))


def visible(name):
    """A file's name as printable text; the bytes of other characters become %XX.

    Different names remain different; two Unicode normal forms of one word are two names.
    """
    name = re.sub("%(?=[0-9A-Fa-f]{2})", "%25", name)  # so that names remain different
    safe = (c if c.isprintable() else "".join(f"%{b:02X}" for b in os.fsencode(c)) for c in name)
    return "".join(safe)


# ----------------------------------------------------------------------------------------- grouping


def group_by_header(source, files, facts, listener):
    """Group files by StudyInstanceUID, and files without one by folder.

    A file without a UID belongs to the study of the nearest folder (see `folders_above`) with DICOM
    files that have a UID in or below it. It is left out if that folder holds several studies, or if
    it is a video file, such as the film about a CD's viewer.
    """
    studies, uids = {}, {}  # UID -> Group; folder -> UIDs in and below it
    of_uid = [f for f in files if facts[f].study_uid]
    medium = is_medium(source, of_uid)
    for file in of_uid:
        uid = facts[file].study_uid
        studies.setdefault(uid, Group([], uid)).files.append(file)
        for folder in folders_above(file, medium):
            uids.setdefault(folder, set()).add(uid)
    if bad := [visible(f) for f in files if facts[f].bad_uid]:
        listener.warning(
            f"{len(bad)} files have an invalid StudyInstanceUID: {some(bad, LISTED)}",
            "they are grouped by folder",
        )
    if not studies:
        return group_by_folder(source, files, listener)
    others, left_out = [], []
    for file in (f for f in files if not facts[f].study_uid):
        nearby = next((uids[p] for p in folders_above(file, medium) if p in uids), set())
        is_video = Path(file).suffix.lower() in VIDEO_SUFFIXES
        if len(nearby) == 1 and not is_video:
            studies[min(nearby)].files.append(file)
        elif nearby or "/" not in file:
            left_out.append(visible(file))
        else:
            others.append(file)
    if left_out:
        listener.warning(
            f"{len(left_out)} files without a StudyInstanceUID are next to DICOM files that have "
            f"one: {some(left_out, LISTED)}; they are left out",
            "to include them, use --group folder or list them in a --manifest",
        )
    groups = split_studies(studies.values(), facts, listener)
    without = first_folders(others)
    if without:
        names = [visible(group.folder) for group in without]
        listener.note(f"{len(without)} studies without a StudyInstanceUID: {some(names, LISTED)}")
    return [*groups, *without]


def is_medium(source, files):
    """Whether the source is a CD or a similar medium, by its DICOM files."""
    first = {PurePosixPath(f).parts[0].lower() for f in files}
    loose = any("/" not in f for f in files)
    return loose or bool(first & UNNAMED) or any(source.glob("[Dd][Ii][Cc][Oo][Mm][Dd][Ii][Rr]"))


def folders_above(file, medium):
    """The folders above a file, from the nearest to the first below the source, or on a medium to
    the source itself."""
    parents = [str(p) for p in PurePosixPath(file).parents]
    return parents if medium else parents[:-1] or ["."]


def split_studies(groups, facts, listener):
    """Split each UID's group by first folder, unless PatientID shows that all files are of one
    patient: some programs write one UID into all files."""
    result, unsure = [], []
    for group in groups:
        of_uid = [f for f in group.files if facts[f].study_uid]
        patients = {facts[f].patient for f in of_uid}
        folders = sorted({PurePosixPath(f).parent.as_posix() for f in of_uid})
        if len(folders) == 1 or (len(patients) == 1 and patients != {""}):
            result.append(group)
            continue
        parts = first_folders(group.files) if len(first_folders(of_uid)) > 1 else []
        result += [replace(part, shared_uid=group.uid) for part in parts] or [group]
        names = " and ".join(map(visible, folders[:LISTED]))
        unsure.append(f"{names} ({len(parts) or 1} studies)")
    if unsure:
        listener.warning(
            f"{len(unsure)} StudyInstanceUIDs are in several folders whose files do not name one "
            f"patient: {some(unsure, LISTED)}",
            "if the number of studies is wrong: --group one for one study, the folder above the "
            "patients' folders as SOURCE, or a --manifest",
        )
    return result


def group_by_folder(source, files, listener):
    """Group files by the source's subfolders; all in one Group if it has none."""
    loose = [f for f in files if "/" not in f]
    if len(loose) == len(files):
        return [Group(files, folder=".")]
    if loose:
        listener.error(
            f"{source} holds both study folders and loose videos ({visible(loose[0])}, ...)",
            "move the loose ones into a folder for their study, or give --group one if all "
            "are one study",
        )
    return first_folders([f for f in files if "/" in f])


def first_folders(files):
    """A Group for each folder in the source that contains files at any depth."""
    groups = {}
    for file in files:
        folder = PurePosixPath(file).parts[0] if "/" in file else "."
        groups.setdefault(folder, Group([], folder=folder)).files.append(file)
    return list(groups.values())


def refuse_several(source, groups, facts, listener):
    """Report an error if a folder that --group takes as one study holds several."""
    several = {}
    for group in groups:
        first = {facts[f].study_uid: f for f in reversed(group.files) if facts[f].study_uid}
        if len(first) > 1:
            several[visible((source.resolve() / group.folder).name)] = sorted(first.values())
    if several:
        name, files = next(iter(several.items()))
        listener.error(
            f"{len(several)} folders hold several studies by their DICOM headers: {some(several)} "
            f"(for example in {name}: {some(map(visible, files))})",
            "use --group dicom to separate them, or list them in a --manifest",
        )


def has_one_patient(files, facts, listener):
    """Whether the files name at most one patient; the listener gets a warning if not."""
    first = {facts[f].patient: f for f in reversed(files) if facts[f].patient}
    if len(first) > 1:
        listener.warning(
            f"the files of one study name {len(first)} patients: "
            f"{some(sorted(map(visible, first.values())))}; the study is left out",
            "correct their PatientID or StudyInstanceUID, or list them in a --manifest",
        )
    return len(first) < 2


# --------------------------------------------------------------------------------- names of studies


def name_groups(source, groups, study_id, listener):
    """A name for each group, all different; sets the groups' folders.

    study_id: 'folder' uses the name of the study's folder (see `choose_folders`); if studies share
    the folder or its name, 8 digits of the SHA-256 of the StudyInstanceUID are added. 'uid' uses
    the StudyInstanceUID, 'digest' the first 16 digits of its SHA-256 (of the folder's name for
    files without one).
    """
    alone = choose_folders(groups)
    folders = [(source.resolve() / group.folder).name for group in groups]
    keys = [
        group.uid or f"{group.shared_uid}folder {name}"
        for group, name in zip(groups, folders, strict=True)
    ]
    if study_id == "digest":
        return [hashlib.sha256(os.fsencode(key)).hexdigest()[:16] for key in keys]
    names = [file_name(name) for name in folders]
    if study_id == "uid":
        if without := [name for group, name in zip(groups, names, strict=True) if not group.uid]:
            listener.error(
                f"studies without a StudyInstanceUID of their own: {some(without, LISTED)}",
                "use --study_id folder, or --group dicom if the files are DICOM",
            )
        return [group.uid or name for group, name in zip(groups, names, strict=True)]
    counts = Counter(names)
    shared = [i for i, name in enumerate(names) if counts[name] > 1 or not alone[i]]
    for i in shared:
        names[i] = file_name(f"{folders[i]}-{short_digest(keys[i])}")
    if shared:
        listener.note(
            f"{len(shared)} studies share their folder or its name; they are named by folder and a "
            f"digest of the StudyInstanceUID: {some([names[i] for i in shared])}"
        )
    return names


def choose_folders(groups):
    """Set each group's folder; returns for each whether it contains no file of another group.

    All folders are at the same depth below the source, unless a group's files are less deep. At
    this depth, most groups have a named folder without files of others. If several depths are
    equally good, the smallest is used, and the source itself last.
    """
    holders = Counter()  # folder -> groups with files below it
    for group in groups:
        holders.update({p for file in group.files for p in PurePosixPath(file).parents})
    common = [PurePosixPath(g.folder or common_folder(g.files)).parts for g in groups]
    depths = [*range(1, max(map(len, common), default=0) + 1), 0]
    choices = [[PurePosixPath(*parts[:depth]) for parts in common] for depth in depths]

    def count_named(folders):
        return sum(holders[f] == 1 and f.name.lower() not in UNNAMED for f in folders)

    folders = max(choices, key=count_named)
    for group, folder in zip(groups, folders, strict=True):
        group.folder = str(folder)
    return [holders[folder] == 1 for folder in folders]


def file_name(name):
    """A study's name as a file name: printable, not hidden, not too long for file systems."""
    name = re.sub(r"[/\\]", "%2F", visible(name))
    name = re.sub(r"^\.", "%2E", name)
    if len(name.encode()) <= LONGEST_NAME:
        return name
    start = name.encode()[: LONGEST_NAME - 9].decode(errors="ignore")
    return f"{start}-{short_digest(name)}"


# Words of names of studies, folders and files that are no names of patients, in lower case.
USUAL_WORD = re.compile(
    r"stud(y|ies|ien?)|patient(s|en|in)?|case|controls?|exam(s|ination)?|visit|test|train(ing)?|"
    r"validation|demo|sample|unnamed|unbenannt|subject|serie[sn]?|scan|site|cent(er|re)|hospital|group|baseline|"
    r"follow|followup|normal|healthy|phantoms?|data(set)?|folder|record(ing)?|session|day|week|"
    r"month|year|part|batch|one|two|three|first|second|real|old|new|unknown|copy|final|raw|net|"
    r"archive|exports?|imports?|loops?|clips?|cines?|movies?|videos?|films?|images?|pictures?|"
    r"frames?|stills?|screen(shot)?|snapshot|capture|files?|avi|mp4|mov|mpe?g|wmv|mkv|webm|dcm|"
    r"dicoms?|jpe?g|png|img|apical|parasternal|sub(c|costal|xiphoid)|suprasternal|short|long|axis|"
    r"chambers?|four|five|view|colou?r|doppler|stress|rest|contrast|strain|zoom|quality|good|poor|"
    r"plax|psax|rvot|lvot|tapse|rvs?p|lvef|tte|tee|left|right|anterior|posterior|lateral|medial|"
    r"inferior|septal|septum|inflow|outflow|tract|tissue|mode|wave|continuous|pulsed|flow|jet|"
    r"regurgitation|stenosis|vena|cava|arch|vein|leaflets?|function|male|female|child|adult|"
    r"fetal|neonat\w*|pa?ediatric\w*|mitral\w*|aort(a|ic)|tri[ck]uspid\w*|pulmonary|valv(e|ular)|"
    r"ventri[ck](le|el|ular)|atri(al|um)|pericard\w*|[ck]ardi[ao]\w*|heart|herz(?!og)\w*|echo\w*|"
    r"ultra(sound|schall)|[ck]lini[ck]\w*|ambulan\w*|station|[ck]ohorte?|kontrollen?|bild(er)?|"
    r"untersuchung(en)?|aufnahmen?|verlauf|befunde?|ordner|kopie|(vier)?kammer(blick)?|klappen?|"
    r"(längs|laengs|lang|kurz)achse|preop|postop|grösse|anon\w*|pseudo\w*|philips|siemens|vivid|epiq|acuson"
)
DATE = r"(?:(?:19|20)\d\d(?:\d{4})?|\d{4}(?:19|20)\d\d)"  # a year, 19700131 or 31011970


def words_of(name):
    """The words of a name with three letters or more, without digits next to them except a date;
    MuellerAnna1970 has two."""
    name = re.sub(r"([a-z\u00df-\u00ff])([A-Z\u00c0-\u00de])", r"\1 \2", name)
    name = re.sub(rf"(?<=[^\W\d_]{{4}})(?={DATE}(?![^\W_]))", " ", name)
    words = re.findall(r"(?<![^\W_])[^\W\d_]{3,}(?![^\W_])", name)
    return [word for word in words if not USUAL_WORD.fullmatch(word.casefold())]


def may_name_patient(name):
    """Whether a part of a path looks like a person's name: Family^Given, a capitalised word that is
    not usual (2024-03-12 Müller), two or three unusual words (DOE_JANE_2, müller_anna), or a word
    and a date (MUELLERJUERGEN1970). A single word of small or capital letters does not.
    """
    name = unicodedata.normalize("NFC", name)
    words = words_of(name)
    letters = sum(map(len, words))
    has_date = re.search(rf"(?<!\d){DATE}(?!\d)", name)
    return (
        bool(re.search(r"[^\W\d_]\^[^\W\d_]", name))
        or any(word.istitle() for word in words)
        or (len(words) in (2, 3) and letters >= 7)
        or bool(has_date and len(words) == 1 and letters >= 5)
    )


def path_may_name_patient(path):
    """`may_name_patient` of a folder or the file of a video's path below its study."""
    return any(may_name_patient(part) for part in path.split("/"))


def has_identifier(name, facts):
    """Whether a name has the PatientID (of three characters or more) or a part of the PatientName
    of a HeaderFacts."""
    name, identifier = name.casefold(), facts.patient.casefold()
    pattern = rf"(?<![^\W_]){re.escape(identifier)}(?![^\W_])"
    if len(identifier) > 2 and re.search(pattern, name):
        return True
    return not set(words_of(name)).isdisjoint(words_of(facts.patient_name.casefold()))


def warn_of_names(studies, facts_of, listener, remedy="--study_id digest takes a digest instead"):
    """Set `Study.names_patient`, and report studies and videos that are named like their patient.

    facts_of: for each study, the HeaderFacts of its files.
    """
    n_studies = n_videos = 0
    for study, of_files in zip(studies, facts_of, strict=True):
        people = {(facts.patient, facts.patient_name): facts for facts in of_files}.values()
        files = [visible(x) for x in (*study.videos, *study.left_out)]
        named = {x for x in files if any(has_identifier(x, facts) for facts in people)}
        in_name = any(has_identifier(study.name, facts) for facts in people)
        study.names_patient = " ".join(["study"] * in_name + ["videos"] * bool(named))
        n_studies += in_name or may_name_patient(study.name)
        n_videos += sum(x in named or path_may_name_patient(x) for x in files)
    if n_studies:
        listener.warning(
            f"{n_studies} of {len(studies)} studies seem to be named after their patient, "
            "and their names are the study ids in all tables",
            remedy,
        )
    if n_videos:
        listener.warning(
            f"{n_videos} of {sum(len(x.videos) + len(x.left_out) for x in studies)} videos seem to "
            "have the patient's name in their file or folder names, which are in tables and logs",
            "rename them before the extraction; pages do not show them",
        )


# ------------------------------------------------------------------------------------- from a table


def studies_of_manifests(source, manifests, listener):
    files = {}  # study -> files relative to the source
    for manifest in manifests:
        for study, file in read_manifest(Path(manifest), source, listener):
            files.setdefault(study, set()).add(file)
    counts = Counter(f for paths in files.values() for f in paths)
    present = {f for f in counts if os.path.isfile(source / f)}
    if several := sorted(visible(f) for f, n in counts.items() if n > 1):
        listener.warning(f"{len(several)} files are listed in two studies: {some(several, LISTED)}")
    facts = read_facts(source, sorted(present))
    studies, mixed, facts_of = [], [], []
    for name, paths in sorted(files.items()):
        group = Group(sorted(paths & present), folder=common_folder(paths))
        facts_of.append([facts[f] for f in group.files])
        study = study_of(name, source, group, facts)
        missing = [str(PurePosixPath(f).relative_to(group.folder)) for f in paths - present]
        study.left_out |= dict.fromkeys(missing, "the manifest's file is missing")
        studies.append(study)
        if any(
            len({getattr(x, key) for x in facts_of[-1]} - {""}) > 1
            for key in ("study_uid", "patient")
        ):
            mixed.append(name)
    if mixed:
        listener.warning(
            f"{len(mixed)} studies of the manifest hold files of several studies or patients by "
            f"their DICOM headers: {some(mixed)}",
            "the grouping of the manifest is used",
        )
    warn_of_names(studies, facts_of, listener, "use other names in the manifest")
    return studies


def read_manifest(manifest, source, listener):
    """Yield (study, path relative to the source) from a table; paths outside it are errors.

    The table has the columns study and path, or is MIMIC-IV-ECHO's record list (study_id,
    dicom_filepath) or the FileList of EchoNet-Dynamic (each video is a study) or -Pediatric (each
    accession is a study). Relative paths start at the source, those of a FileList at its folder.
    """
    table = read_table(manifest, listener, "manifest")
    columns = set(table.columns)
    if {"study", "path"} <= columns:
        studies, paths = table["study"], table["path"]
    elif {"study_id", "dicom_filepath"} <= columns:
        studies, paths = table["study_id"], table["dicom_filepath"]
    elif "FileName" in columns:
        names = table["FileName"].dropna().str.removesuffix(".avi")
        folder = manifest.parent.resolve()
        folder = folder / "Videos" if (folder / "Videos").is_dir() else folder
        paths = names.map(lambda name: str(folder / f"{name}.avi"))
        studies = names.map(lambda n: m[1] if (m := ECHONET_PEDIATRIC.match(n)) else n)
    else:
        listener.error(
            f"{manifest} has columns {some(table.columns, 9)}; a manifest has study and path"
            f"{nearest('path', columns)}"
        )
        return
    for line, study, path in zip(studies.index, studies, paths, strict=True):
        if not isinstance(study, str) or not isinstance(path, str):
            listener.error(f"{manifest}, line {line}: study or path is empty", "fill it in")
        elif file_name(study) != study:
            listener.error(
                f"{manifest}, line {line}: {study[:60]!a} cannot be a study's name, since it "
                "cannot name the output file",
                "use letters, digits, . - and _",
            )
        elif (below := path_below(source, path)) is None:
            listener.error(
                f"{manifest}, line {line}: the path is outside {source}",
                "give a source that holds all files of the list",
            )
        else:
            yield study, below


def path_below(source, path):
    """A path as a POSIX path relative to the source; None if it is outside."""
    path = os.path.normpath(source.absolute() / path)
    for root in (os.path.normpath(source.absolute()), os.path.realpath(source)):
        if path.startswith(os.path.join(root, "")):
            return Path(path).relative_to(root).as_posix()
    return None


def studies_of_dataset(base, folder_format="{echo_id}_trim", ids=None, listener=None):
    """Studies whose videos are in `base`/`folder_format`, the published config's
    `video_base_path` and `video_subdir_format`; named by their echo_id.

    ids: the studies to read; None for all. Those without videos are reported to the listener.
    """
    base, listener = Path(base), listener or Findings()
    start, holder, end = folder_format.partition("{echo_id}")
    if not holder:
        listener.error(
            f"video_subdir_format '{folder_format}' does not contain {{echo_id}}", "add it"
        )
        return []
    if not base.is_dir():
        listener.error(f"no folder {base}", "see video_base_path in the config")
        return []
    if ids is None:
        paths = [p.relative_to(base).as_posix() for p in base.glob(f"{start}*{end}") if p.is_dir()]
        ids = sorted(path[len(start) : len(path) - len(end)] for path in paths)
    studies, absent = [], []
    for eid in ids:
        folder = f"{start}{eid}{end}"
        files = []
        if file_name(eid) == eid and path_below(base, folder) and (base / folder).is_dir():
            files = [f"{folder}/{f}" for f in find_videos(base / folder)[0]]
        if not files:
            absent.append(eid)
            continue
        facts = read_facts(base, files)
        if has_one_patient(files, facts, listener):
            studies.append(study_of(eid, base, Group(files, folder=folder), facts))
    if absent:
        listener.warning(
            f"{len(absent)} studies have no video in {base / folder_format}: {some(absent)}",
            "video_subdir_format in the config gives the name of a study's folder",
        )
    return studies


# ------------------------------------------------------------------------------------- many workers


def shard_from(text):
    """`--shard i/n` (i from 0) -> (i, n); 'auto' reads torchrun's or SLURM's environment."""
    if text != "auto":
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or int(match[1]) >= int(match[2]):
            raise UserError(f"--shard is i/n with i from 0 to n - 1, not {text}")
        return int(match[1]), int(match[2])
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return rank_and_size("RANK", "WORLD_SIZE")
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        first = from_environment("SLURM_ARRAY_TASK_MIN", 0)
        index = from_environment("SLURM_ARRAY_TASK_ID", 0) - first
        if index < 0:
            raise UserError("SLURM_ARRAY_TASK_ID is below SLURM_ARRAY_TASK_MIN; give --shard i/n")
        return index, max(index + 1, from_environment("SLURM_ARRAY_TASK_COUNT", 1, least=1))
    if "SLURM_NTASKS" in os.environ and "SLURM_PROCID" in os.environ:
        return rank_and_size("SLURM_PROCID", "SLURM_NTASKS")
    return 0, 1
