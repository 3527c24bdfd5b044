"""Answers as web pages: a list of studies, and a report of each study with its videos.

A folder with index.html, studies/, clips/, a style sheet and a script: it opens from disk without
network requests. It contains no identifiers except study ids and video names; those that may name
the patient are replaced, and listed in a table next to the folder.
"""

import datetime
import hashlib
import os
import re
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from echofocus_core import __version__
from echofocus_core.base import releases
from echofocus_core.base.console import RUN, count_of, printable, progress
from echofocus_core.base.files import atomic_path, sha256_file, write_table
from echofocus_core.base.hdf5 import UNREADABLE
from echofocus_core.report.html import TEMPLATES, page_templates, write_text
from echofocus_core.report.inspect import origin_of
from echofocus_core.report.page_labels import clip_marks, label_view, number, percent, title_of
from echofocus_core.study.input_check import FEWEST, NAMES_PATIENT, UNUSUAL
from echofocus_core.study.loading import released_task
from echofocus_core.study.sources import source_studies
from echofocus_core.video.errors import VideoError
from echofocus_core.video.extract import map_in_processes
from echofocus_core.video.playback import Playback, stored_clip
from echofocus_core.video.store import (
    StudyDetails,
    encoder_text,
    is_untrained,
    load_details,
    open_folder,
)
from echofocus_core.video.studies import may_name_patient, path_may_name_patient, visible

FEW_LABELS = 3  # are all open, whatever their answers
MAX_SENTENCES = 5  # at the top of a study
UNTRAINED = "The video encoder is untrained (random weights): for trials, not for results."
DIFFERS = (
    "It may differ from the answer without the video, even in direction: if another video shows "
    "the same, leaving out one of them changes little."
)
SCORES = {  # method -> what its scores are
    "shapley": "A score is the mean change of the answer when the video is added to some of the "
    f"others (its Shapley value). {DIFFERS}",
    "leave_one_out": "A score is the change of the answer when the video is left out. Scores do "
    "not add up to the answer.",
    "attention": "A score is the share of the model's attention that the video gets (attention "
    "rollout). It does not show whether the video supports the answer.",
}
LOSS = (
    "A score is the part of the error (the loss) that is due to the video: one with a negative "
    "score brought the answer closer to the label."
)
GRADIENTS = (  # of the other methods
    "A score is the part of the change from the reference to the answer that is due to the video "
    f"(integrated gradients). {DIFFERS}"
)


# ---------------------------------------------------------------------------------------- studies


@dataclass
class PageVideo:
    """A video of a study on the page."""

    name: str
    shown: str  # its name on the page
    clip: str = ""  # its file, from the page's folder; its first frame is next to it, as .jpg
    playback: Playback | None = None
    # why there is no clip
    missing: str = "the source video is not available; video_base_path in the config names it"
    note: str = ""

    def data(self):
        """For the script of the page."""
        film = self.playback
        if film is None:
            return {"name": self.shown, "missing": self.missing}
        return {
            "name": self.shown, "clip": self.clip, "frames": film.frames, "note": self.note,
            "rate": round(film.rate, 3), "width": film.width, "height": film.height,
        }  # fmt: skip


@dataclass
class PageStudy:
    """A study on the page."""

    eid: str
    row: dict  # of the prediction table
    names: list[str]  # of its videos, in the order of the embeddings
    explanation: dict | None = None  # `attribution.explain_study`
    truths: np.ndarray | None = None  # (T,) in physical units
    details: StudyDetails = field(default_factory=StudyDetails)
    source: object = None  # the `studies.Study` of its videos, where it is available
    # encoder -> attributes of its clip embeddings; names of videos begin with it if several
    encoders: dict = field(default_factory=lambda: {"": {}})

    @property
    def warning(self):
        return self.row.get("warning") or ""

    @cached_property
    def title(self):
        """Its id, or a digest of it where the id may name the patient."""
        return id_digest(self.eid) if NAMES_PATIENT in self.warning else public_id(self.eid)

    @cached_property
    def videos(self):
        return [PageVideo(name, self.replaced.get(name, name)) for name in self.names]

    @cached_property
    def replaced(self):
        """{name that may name the patient: what the page shows}, of its videos and skipped files.

        If a name has the PatientID or PatientName of the DICOM files, none of its names is shown.
        Otherwise the file stays, if only a folder may name the patient: 'video 2 (A4C.avi)'.
        """
        by_header = any(
            "videos" in str(made_with.get("names_patient", ""))
            for made_with in self.encoders.values()
        )
        files, replaced = [name for name, _ in self.details.skipped], {}
        for kind, names in (("video", self.names), ("file", files)):
            for n, name in enumerate(names, 1):
                path = name
                for encoder in self.encoders:
                    path = path.removeprefix(f"{encoder}/")
                if by_header or path_may_name_patient(path):
                    file = PurePosixPath(path).name
                    is_shown = not by_header and not may_name_patient(file)
                    replaced[name] = f"{kind} {n}" + f" ({file})" * is_shown
        return replaced

    def public(self, text):
        """A text without the names that may name the patient."""
        for name in sorted(self.replaced, key=len, reverse=True):
            text = text.replace(name, self.replaced[name])
        return text.replace(self.eid, self.title)

    @cached_property
    def files(self):
        """The source's videos by visible name, and by file name if that is unique."""
        if self.source is None:
            return {}
        by_name = {visible(video): video for video in self.source.videos}
        by_file_name = {}
        for name, video in by_name.items():
            by_file_name.setdefault(PurePosixPath(name).name, []).append(video)
        files = {name: v[0] for name, v in by_file_name.items() if len(v) == 1} | by_name
        encoders = (f"{x}/" if x else "" for x in self.encoders)
        return {f"{encoder}{name}": v for encoder in encoders for name, v in files.items()}


def public_id(eid):
    return id_digest(eid) if may_name_patient(eid) else eid


def id_digest(eid):
    """The id that `--study_id digest` gives to a study's folder without a StudyInstanceUID."""
    return hashlib.sha256(os.fsencode(eid)).hexdigest()[:16]


@dataclass
class Page:
    """Everything that the page shows."""

    folder: Path
    model: object  # a LoadedModel
    settings: object
    studies: list[PageStudy]
    left_out: dict[str, str]
    plain: dict = field(default_factory=dict)  # label -> its name in plain words


def make_page(job, folder, table, left_out, explanations=(), truths=None):
    """Write the page for the studies in a prediction table, with explanations; print its path."""
    by_study = {x["eid"]: x for x in explanations if x["columns"]}
    sources = source_studies(job, list(table["eid"]))
    paths, studies, stores = job.dataset.embedding_paths, [], job.source.store.parts
    files = open_folder(paths[0]).files if len(paths) == 1 and paths[0].is_dir() else {}
    for row in table.to_dict("records"):
        eid = row["eid"]
        explanation = by_study.get(eid)
        names = explanation["videos"] if explanation else job.source.store.read(eid).videos
        truth = None if truths is None else truths.loc[eid].to_numpy()
        try:
            details = load_details(files[eid]) if eid in files else StudyDetails()
        except UNREADABLE:
            details = StudyDetails()
            RUN.warning(
                f"{files[eid].name} is damaged: the page neither marks its clips nor lists the "
                "skipped files",
                "extract or copy it again",
            )
        source = sources.get(eid)
        encoders = {
            encoder: header.made_with
            for encoder, store in stores.items()
            for _, header in store.readable_headers({eid} & store.files.keys())
        }
        studies.append(PageStudy(eid, row, names, explanation, truth, details, source, encoders))
    plain = released_task(job.model.task).get("names", {}) | (job.task.names if job.task else {})
    page = Page(folder, job.model, job.settings, studies, left_out, plain)
    print(f"wrote {write_page(page)}")


def write_page(page):
    """Write the page; returns the path of index.html. Replaces an older page file by file."""
    folder, settings = page.folder, page.settings
    write_clips(folder, page.studies, settings.page_mask, settings.workers)
    for source, name in (("style.css", "page.css"), ("page.js", "page.js")):
        with atomic_path(folder / name) as temporary:
            shutil.copyfile(TEMPLATES / source, temporary)
    views = [StudyView(page, study, f"studies/{n}.html") for n, study in enumerate(page.studies, 1)]
    labels = [label for view in views for label in view.labels]
    made_with = [x for study in page.studies for x in study.encoders.values()]
    common = {
        "page": page, "settings": settings, "model": page.model.folder.name,
        "origin": origin_facts(page), "n_studies": len(views), "unusual": UNUSUAL,
        "labelled": any(label.truth is not None for label in labels),
        "explained": any(study.explanation for study in page.studies),
        "decides": any(label.decision is not None for label in labels),
        "undecided": any(label.kind == "binary" and label.decision is None for label in labels),
        "untrained": UNTRAINED * any(map(is_untrained, made_with)),
        "why_no_novelty": why_no_novelty(page.model.record),
        "has_novelty": any(view.novelty is not None for view in views),
        "has_range": any(label.range_text for label in labels),
    }  # fmt: skip
    templates = page_templates()
    report = templates.get_template("page_study.html")
    for n, view in enumerate(views, 1):
        before, after = n > 1 and f"{n - 1}.html", n < len(views) and f"{n + 1}.html"
        text = report.render(common, up="../", study=view, number=n, before=before, after=after)
        write_text(folder / view.href, text)
    left_out = [
        (public_id(printable(eid)), printable(x).replace(eid, public_id(eid)))
        for eid, x in page.left_out.items()
    ]
    text = templates.get_template("page_list.html").render(
        common, up="", studies=views, left_out=left_out, labels=[
            (": ".join(filter(None, title_of(page, name))), name)
            for name in page.model.outputs.names
        ],
        data=[view.list_data() for view in views], model_kind=page.model.kind,
        classes={label.name for view in views for label in view.by_output if label.grade},
    )  # fmt: skip
    write_text(folder / "index.html", text)
    remove_leftovers(page, len(views))
    write_names(page)
    return folder / "index.html"


def write_names(page):
    """Write what the page shows instead of names that may name the patient, next to its folder."""
    path = page.folder.with_name(f"{page.folder.name}_names.csv")
    rows = [(eid, "", public_id(eid)) for eid in page.left_out if public_id(eid) != eid]
    for study in page.studies:
        rows += [(study.eid, "", study.title)] * (study.title != study.eid)
        rows += [(study.eid, *pair) for pair in study.replaced.items()]
    path.unlink(missing_ok=True)
    if rows:
        write_table(pd.DataFrame(rows, columns=["eid", "file", "on_page"]), path)
        print(f"{path} lists the names that the page does not show: keep it with the tables")


def why_no_novelty(record):
    """Why the novelty of a study is not known, by the Record of its model."""
    if 0 < record.train_patients < FEWEST:
        return (
            f"The model was trained on {count_of(record.train_patients, 'patients')}: too few to "
            "judge how unusual a study is."
        )
    return "How unusual a study is cannot be judged: the model has no record of its training data."


def origin_facts(page):
    """[text] for the foot of the page: date, model, encoder, dataset, licences and citations."""
    model, settings = page.model, page.settings
    digests = [
        sha256_file(path)[:12]
        for member in getattr(model, "members", [model])
        for name in releases.USED
        if (path := member.folder / name).is_file()
    ]
    digest = f" (SHA-256 {', '.join(digests)})" if digests else ""
    facts = [datetime.date.today().isoformat(), f"model {model.folder.name}{digest}"]
    if settings.dataset and not settings.videos:
        facts.append(f"dataset {settings.dataset}")
    origins, encoders = [origin_of(model.folder)], {}
    for study in page.studies:
        origins.append(study.details.attributes)
        for made_with in study.encoders.values():
            encoders[encoder_text(made_with)] = None
            is_panecho = made_with.get("encoder", "panecho").lower() == "panecho"
            if is_panecho and made_with.get("weights") and not is_untrained(made_with):
                origins.append(releases.registry()["PanEcho"])
    facts += [f"encoder {x}" for x in encoders]
    facts += dict.fromkeys(f"licence {x['licence']}" for x in origins if x.get("licence"))
    facts += dict.fromkeys(f"cite {x['citation']}" for x in origins if x.get("citation"))
    masked = "masked to the ultrasound sector" if settings.page_mask == "sector" else "not masked"
    return [*facts, f"clips {masked}", f"EchoFocus {__version__}"]


def remove_leftovers(page, n_studies):
    """Remove study pages and clips of an older page that are no longer used."""
    for path in (page.folder / "studies").glob("*.html"):
        if path.stem.isdecimal() and int(path.stem) > n_studies:
            path.unlink()
    used = {Path(video.clip).stem for study in page.studies for video in study.videos}
    for path in (page.folder / "clips").iterdir():
        if re.fullmatch(r"[0-9a-f]{16}", path.stem) and path.stem not in used:
            path.unlink()


def write_clips(folder, studies, mask, workers=0):
    """Write the clips of all videos below `folder`, and fill in each PageVideo.

    Clips are named by their content, so that a later page reuses them, and copies of a video share
    one clip.
    """
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    calls = []
    for study in studies:
        contents = {name: record.content for name, record in study.details.files.items()}
        for video in study.videos:
            if video.name not in study.files:
                continue
            source = study.source.source(study.files[video.name])
            if not contents.get(video.name):
                video.note = (
                    "matched by name only: the embeddings do not record the video's content"
                )
            call = stored_clip, source, folder / "clips", mask, contents.get(video.name, "")
            calls.append(((study, video), call))
    replies = map_in_processes(calls, workers) if calls else ()
    for (study, video), (reply, _) in progress(
        replies, desc="clips", unit="video", total=len(calls)
    ):
        if isinstance(reply, VideoError):
            video.missing = study.public(str(reply))
            continue
        name, video.playback = reply
        video.clip = f"clips/{name}"
        if not video.playback.rate_is_known:
            unknown = "its file does not record the frame rate"
            video.note = "; ".join(filter(None, [video.note, unknown]))


class StudyView:
    """A PageStudy for the templates."""

    def __init__(self, page, study, href):
        self.page, self.study, self.href = page, study, href
        self.title, self.row, self.videos = study.title, study.row, study.videos
        self.by_output = [label_view(page, study, i) for i in range(len(page.model.outputs.names))]
        self.labels = sorted(self.by_output, key=lambda label: label.order)
        explained = [label for label in self.labels if label.details]
        for label in explained:
            label.is_open = bool(label.decision) or len(explained) <= FEW_LABELS
        if explained and not any(label.is_open for label in explained):
            explained[0].is_open = True
        self.novelty = number(study.row.get("novelty"))
        self.warnings = [text for text in study.public(study.warning).split("; ") if text]
        self.untrained = (
            ""
            if "untrained" in study.warning
            else UNTRAINED * any(map(is_untrained, study.encoders.values()))
        )
        self.skipped = [map(study.public, pair) for pair in study.details.skipped]

    @property
    def groups(self):
        """[(heading, LabelViews)]: findings, grades by label, measurements, survival."""
        headings = {"binary": "Finding", "regression": "Measurement", "survival": "Log hazard"}
        groups = {}
        for label in self.labels:
            heading = label.grade or headings.get(label.kind, "Reading")
            groups.setdefault(heading, []).append(label)
        return list(groups.items())

    @property
    def sentences(self):
        """The answers in words, the most important ones first."""
        labels = [label for label in self.labels if not label.grade or label.decision]
        if len(labels) <= FEW_LABELS:
            return [label.sentence for label in labels]
        grades = [label.sentence for label in labels if label.grade]
        findings = [label for label in labels if label.kind == "binary" and not label.grade]
        present = [label for label in findings if label.decision]
        absent = [label for label in findings if label.decision is False]
        if absent and not present:
            none = f"None of {len(absent)} findings reaches its threshold. The highest: "
            return [none * (len(absent) > 1) + absent[0].sentence, *grades]
        shown = present or findings[:1] or ([] if grades else labels[:2])
        more = len(shown) - MAX_SENTENCES
        texts = [label.sentence for label in shown[:MAX_SENTENCES] if label.value is not None]
        texts += [f"{more} more findings reach their thresholds; see below."] * (more > 0)
        return texts + grades

    @property
    def more(self):
        """[(name, text)] of further answers, such as survival."""
        rows = []
        for label in self.page.model.outputs.each:
            for name, answer in label.more_answers(self.row):
                if not isinstance(answer, str):
                    answer = "" if number(answer) is None else percent(answer)
                if answer:
                    rows.append((name, answer))
        return rows

    def data(self):
        """What the script needs to show videos and explanations."""
        details = {label.number: label.details for label in self.labels if label.details}
        videos = [
            video.data() | {"clips": clip_marks(self.study.details, video)} for video in self.videos
        ]
        explanation, note, settings = self.study.explanation or {}, "", self.page.settings
        notes = {video.get("note", video.get("missing")) for video in videos}
        if len(notes) == 1 and len({video.get("clip", "") != "" for video in videos}) == 1:
            (note,) = notes
            videos = [{k: v for k, v in x.items() if k not in ("note", "missing")} for x in videos]
        return {
            "videos": videos, "labels": details, "note": note,
            "reference": explanation.get("baseline_name", ""),
            "scores": SCORES.get(settings.explain_method, GRADIENTS)
            if settings.explain_mode == "pred"
            else LOSS,
        }  # fmt: skip

    @property
    def poster(self):
        return self.posters[0] if self.posters else ""

    @cached_property
    def posters(self):
        """Of each output, the clip of the video that its answer most depends on; '' for none."""
        first = next((video.clip for video in self.videos if video.clip), "")
        return [
            (label.top_video is not None and self.videos[label.top_video].clip) or first
            for label in self.by_output
        ]

    def list_data(self):
        """The values by which the script of the list sorts and filters a study."""
        names = [video.shown for video in self.videos]
        return {
            "eid": self.title, "text": " ".join([self.title, *self.warnings, *names]).lower(),
            "novelty": self.novelty, "videos": len(names),
            "warned": self.novelty is not None and self.novelty > UNUSUAL,
            "labels": [
                [*label.list_data(), poster]
                for label, poster in zip(self.by_output, self.posters, strict=True)
            ],
        }  # fmt: skip
