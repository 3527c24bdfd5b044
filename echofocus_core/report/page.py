"""Answers as web pages: a list of studies, and a report of each study with its videos.

A folder with index.html, studies/, clips/, a style sheet and a script: it opens from disk without
network requests. It contains no identifiers except study ids and video names.
"""

import re
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from echofocus_core import __version__
from echofocus_core.base.console import RUN, printable, progress
from echofocus_core.base.files import atomic_path
from echofocus_core.base.hdf5 import UNREADABLE
from echofocus_core.study.explanations import label_explanation
from echofocus_core.study.input_check import UNUSUAL
from echofocus_core.study.loading import released_task
from echofocus_core.study.sources import source_studies
from echofocus_core.video.decode import first_frames
from echofocus_core.video.errors import VideoError
from echofocus_core.video.extract import map_in_processes
from echofocus_core.video.playback import Playback, stored_clip
from echofocus_core.video.store import StudyDetails, load_details, open_folder
from echofocus_core.video.studies import visible

TEMPLATES = Path(__file__).with_name("templates")
MAX_BARS = 16  # of a waterfall; the videos with the smallest scores share one bar
MAX_PLAYERS = 3  # for each sign
MAX_DETAILS = 24  # labels with a waterfall, clearest answers first


# ---------------------------------------------------------------------------------------- studies


@dataclass
class PageVideo:
    """A video of a study on the page."""

    name: str
    clip: str = ""  # its file, from the page's folder
    playback: Playback | None = None
    missing: str = "the source video is not available"  # why there is no clip
    note: str = ""


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
    encoders: tuple = ("",)  # of which the names of videos begin, where several are joined

    @cached_property
    def videos(self):
        return [PageVideo(name) for name in self.names]

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
    paths, studies, encoders = job.dataset.embedding_paths, [], tuple(job.source.store.parts)
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
        studies.append(PageStudy(eid, row, names, explanation, truth, details, source, encoders))
    plain = released_task(job.model.task).get("names", {}) | (job.task.names if job.task else {})
    page = Page(folder, job.model, job.settings, studies, left_out, plain)
    print(f"wrote {write_page(page)}")


def write_page(page):
    """Write the page; returns the path of index.html. Replaces an older page file by file."""
    import jinja2

    folder, settings = page.folder, page.settings
    write_clips(folder, page.studies, settings.page_mask, settings.workers)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    for name in ("page.css", "page.js"):
        with atomic_path(folder / name) as temporary:
            shutil.copyfile(TEMPLATES / name, temporary)
    views = [StudyView(page, study, f"studies/{n}.html") for n, study in enumerate(page.studies, 1)]
    common = {
        "page": page, "settings": settings, "model": page.model.folder.name,
        "version": __version__, "unusual": UNUSUAL,
        "labelled": any(label.truth is not None for view in views for label in view.labels),
        "explained": any(study.explanation for study in page.studies),
        "decides": bool(page.model.record.thresholds),
        "has_novelty": any(view.novelty is not None for view in views),
        "has_range": any(label.width is not None for view in views for label in view.labels),
    }  # fmt: skip
    report = environment.get_template("page_study.html")
    for n, view in enumerate(views, 1):
        before, after = n > 1 and f"{n - 1}.html", n < len(views) and f"{n + 1}.html"
        text = report.render(common, up="../", study=view, before=before, after=after)
        write_text(folder / view.href, text)
    left_out = [tuple(map(printable, pair)) for pair in page.left_out.items()]
    labels = [
        f"{x} ({page.plain[x]})" if page.plain.get(x) else x for x in page.model.outputs.names
    ]
    text = environment.get_template("page_list.html").render(
        common, up="", studies=views, left_out=left_out, labels=labels,
        data=[view.list_data() for view in views],
    )  # fmt: skip
    write_text(folder / "index.html", text)
    remove_leftovers(page, len(views))
    return folder / "index.html"


def write_text(path, text):
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
            calls.append((video, call))
    replies = map_in_processes(calls, workers) if calls else ()
    for video, (reply, _) in progress(replies, desc="clips", unit="video", total=len(calls)):
        if isinstance(reply, VideoError):
            video.missing = str(reply)
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
        self.eid, self.row, self.videos = study.eid, study.row, study.videos
        self.labels = [label_view(page, study, i) for i in range(len(page.model.outputs.names))]
        explained = [label for label in self.labels if label.scores]
        for label in sorted(explained, key=lambda label: -label.clarity)[:MAX_DETAILS]:
            label.details = True
        self.n_hidden = sum(not label.details for label in explained)
        self.novelty = number(study.row.get("novelty"))
        self.warning = study.row.get("warning", "")
        clips = [label.top_clip for label in explained] + [video.clip for video in study.videos]
        self.thumb = next(filter(None, clips), "")

    @property
    def more(self):
        """[(name, text)] of further answers (most probable class, survival)."""
        rows = []
        for label in self.page.model.outputs.each:
            for name, answer in label.more_answers(self.row):
                if not isinstance(answer, str):
                    answer = "" if number(answer) is None else percent(answer)
                if answer:
                    rows.append((name, answer))
        return rows

    def list_data(self):
        """The values by which the script of the list sorts and filters a study."""
        names = [video.name for video in self.videos]
        return {
            "eid": self.eid, "text": " ".join([self.eid, self.warning, *names]).lower(),
            "novelty": self.novelty, "videos": len(names),
            "warned": self.novelty is not None and self.novelty > UNUSUAL,
            "labels": [label.list_data(self.thumb) for label in self.labels],
        }  # fmt: skip


# ------------------------------------------------------------------------------------------ labels


def number(value):
    """A finite number, or None."""
    return None if value is None or not np.isfinite(value) else float(value)


def percent(share):
    return f"{100 * share:.1f} %"


@dataclass
class LabelView:
    """One output of a study for the templates; missing values are None."""

    name: str
    plain: str
    number: int
    kind: str
    unit: str
    value: float | None
    low: float | None
    high: float | None
    threshold: float | None
    truth: float | None
    scores: "Scores | None" = None
    details: bool = False  # whether its waterfall and players are shown

    def text(self, value):
        """A probability in percent, or a value with its unit; '' if missing."""
        if number(value) is None:
            return ""
        if self.kind == "binary":
            return percent(value)
        return f"{value:#.4g} {self.unit}".strip().replace(". ", " ").removesuffix(".")

    @property
    def width(self):
        return None if self.low is None or self.high is None else self.high - self.low

    @property
    def range_text(self):
        return "" if self.width is None else f"{self.text(self.low)} to {self.text(self.high)}"

    @property
    def truth_text(self):
        if self.truth is None or self.kind != "binary":
            return self.text(self.truth)
        return "present" if self.truth else "absent"

    @property
    def decision(self):
        unknown = self.threshold is None or self.value is None
        return None if unknown else self.value >= self.threshold

    @property
    def right(self):
        unknown = self.decision is None or self.truth is None
        return None if unknown else self.decision == bool(self.truth)

    @property
    def clarity(self):
        """Sort key of labels: findings by distance from the threshold, others in their order."""
        if self.kind != "binary":
            return -self.number
        cut = 0.5 if self.threshold is None else self.threshold
        return -1 if self.value is None else abs(self.value - cut)

    @property
    def top_clip(self):
        return self.scores.top[0].video.clip if self.scores and self.scores.top else ""

    def list_data(self, thumb):
        values = {x: getattr(self, x) for x in ("value", "width", "decision", "right", "truth")}
        shown = self.text(self.value) + (f" ({self.range_text})" if self.range_text else "")
        return values | {
            "shown": shown, "width_shown": self.text(self.width), "truth_shown": self.truth_text,
            "thumb": self.top_clip or thumb,
        }  # fmt: skip


@dataclass
class Player:
    """A video with the score of one label."""

    video: PageVideo
    score: float
    without: str  # the answer without the video
    clips: list[dict]  # the positions of its clips on the timeline


@dataclass
class Bar:
    """A bar of a waterfall, from `start` to `end` in the unit of the scores."""

    name: str
    score: float
    without: str  # the answer without the video; '' for several videos
    start: float = 0.0
    end: float = 0.0
    is_rest: bool = False  # several videos


@dataclass
class Scores:
    """The attribution of one label: the waterfall, the top and bottom videos."""

    unit: str
    without: str  # the range of answers if one of the videos is left out
    top: list[Player]
    bottom: list[Player]
    bars: list[Bar]
    adds_up: bool  # whether the scores add up to the change from the baseline answer
    baseline: str
    baseline_name: str  # what the baseline answer is, in words
    answer: str
    fault: str  # a sentence for the place of the waterfall, if the scores have no meaning
    error: float
    low: float
    high: float


def label_view(page, study, i):
    """LabelView of output i of a PageStudy."""
    model, label = page.model, page.model.outputs.names[i]
    unit = model.unit(label)
    ending = f" [{unit}]" if unit else ""
    value, low, high = (
        number(study.row.get(f"{label}{part}{ending}")) for part in ("", "_low", "_high")
    )
    kind = model.kind(label)
    view = LabelView(
        label, page.plain.get(label, ""), i, kind, "log hazard" if kind == "survival" else unit,
        value, low, high, model.record.thresholds.get(label),
        None if study.truths is None else number(study.truths[i]),
    )  # fmt: skip
    columns = study.explanation["columns"] if study.explanation else ()
    if i in columns and np.isfinite(study.explanation["scores"][columns.index(i)]).all():
        view.scores = scores_of(page, study, view)  # a single video has none by leave_one_out
    return view


def scores_of(page, study, view):
    """Scores of one label of a PageStudy."""
    model, settings, explanation, i = page.model, page.settings, study.explanation, view.number
    x = label_explanation(model, explanation, explanation["columns"].index(i), settings)
    scores, without, loss = x.scores, x.without, settings.explain_mode == "loss"

    def player(v):
        clips = clip_marks(study.details, study.videos[v], x.of_clips[v])
        return Player(study.videos[v], scores[v], view.text(without[v]), clips)

    order, finite = np.argsort(-scores, kind="stable"), without[np.isfinite(without)]
    limits = [view.text(value) for value in (finite.min(), finite.max())] if len(finite) else []
    ends = np.zeros(2) if loss or not x.adds_up else x.ends
    bars = waterfall(study.names, scores, [view.text(y) for y in without], ends[0], x.adds_up)
    levels = [*ends, *(level for bar in bars for level in (bar.start, bar.end))]
    return Scores(
        x.unit, " to ".join(dict.fromkeys(limits)),
        [player(v) for v in order[:MAX_PLAYERS] if scores[v] > 0],
        [player(v) for v in order[::-1][:MAX_PLAYERS] if scores[v] < 0],
        bars, x.adds_up, "" if loss else view.text(x.baseline), x.baseline_name,
        f"loss {explanation['losses'][i]:.3g}" if loss else view.text(x.answer), x.fault,
        x.error, min(levels), max(levels),
    )  # fmt: skip


def waterfall(names, scores, without, start, adds_up):
    """[Bar] of the videos in the order of their scores, at most MAX_BARS.

    Each bar starts at the end of the previous one, the first at `start`; if scores do not add up,
    every bar starts at 0.
    """
    strong = np.argsort(-np.abs(scores), kind="stable")
    bars = [Bar(names[v], float(scores[v]), without[v] and f"without {without[v]}") for v in strong]
    if len(bars) > MAX_BARS:
        weak = strong[MAX_BARS - 1 :]
        rest = Bar(f"{len(weak)} other videos", float(scores[weak].sum()), "", is_rest=True)
        bars = [*bars[: MAX_BARS - 1], rest]
    bars.sort(key=lambda bar: -bar.score)
    for bar in bars:
        bar.start, bar.end = start, start + bar.score
        start = bar.end if adds_up else 0.0
    return bars


def clip_marks(details, video, scores):
    """The positions of a video's clips on its timeline, in percent. `best` is the clip that
    contributed most in the direction of the video's score."""
    starts = details.starts.get(video.name)
    if starts is None or not video.playback or len(starts) != len(scores):
        return []
    frames, first = video.playback.frames, first_frames(starts)
    length = details.attributes.get("clip_len", 0)
    if "stride" in details.attributes:  # windows, not random starts
        first, length = starts, (length - 1) * details.attributes["stride"] + 1
    best = int(np.argmax(scores if scores.sum() >= 0 else -scores))
    marks = []
    for c in np.unique(np.append(np.unique(first, return_index=True)[1], best)):
        end = min(first[c] + length, frames)
        marks.append({
            "left": round(100 * first[c] / frames, 3), "best": c == best,
            "width": round(100 * (end - first[c]) / frames, 3),
            "title": f"frames {first[c] + 1} to {end}: {scores[c]:+.3g}",
        })  # fmt: skip
    return marks
