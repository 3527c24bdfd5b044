"""Answers as a page to look at: a list of studies, a report of each, and its videos playing.

A folder with index.html, studies/, clips/ and one style sheet and script: it opens from disk and
asks nothing of the network. No identifier is on it but study ids and the videos' names.
"""

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from pydantic import TypeAdapter

from echofocus_core import __version__
from echofocus_core.base.console import printable, progress
from echofocus_core.base.files import atomic_path
from echofocus_core.study.explanations import score_unit
from echofocus_core.study.input_check import UNUSUAL
from echofocus_core.video.decode import RATES, VideoError, content_digest, first_frames
from echofocus_core.video.errors import FRAMES
from echofocus_core.video.extract import decoders, in_processes
from echofocus_core.video.playback import LONGEST_SIDE, Playback, write_playback
from echofocus_core.video.store import StudyDetails
from echofocus_core.video.studies import visible

TEMPLATES = Path(__file__).with_name("templates")
BARS = 16  # of a waterfall; the videos between are drawn as one
PLAYERS = 3  # of each sign
DETAILED = 24  # labels with a waterfall, the clearest first

MEANING = {
    "gradients": (
        "A score says how much of the way from the baseline (clips that say nothing) to this "
        "study's answer went through that video, in this model: all scores add up to the change.",
        "It does not say that the video shows a disease, that the model looked where you would, "
        "nor what another model would make of it.",
        "The plainer question is answered by 'without it': what the answer would be had the video "
        "not been taken.",
    ),
    "leave_one_out": (
        "A score is the change of the answer when the video is left out.",
        "It does not say that the video shows a disease; of two videos that show the same, each "
        "alone may seem to matter little.",
        "Scores do not add up to the answer.",
    ),
    "attention": (
        "A score is the share of the model's attention that a video gets (attention rollout).",
        "It says where the model looked, not whether that spoke for or against the answer.",
        "It does not say that the video shows a disease.",
    ),
}


# ------------------------------------------------------------------------------------------- clips


@dataclass
class Shown:
    """A video of a study, as the page has it."""

    name: str
    clip: str = ""  # its file, from the page's folder
    why: str = "the source video is not at hand"  # there is no clip
    frames: int = 0
    rate: float = 0.0
    rate_shown: str = ""
    note: str = ""
    width: int = 0
    height: int = 0


def write_clips(folder, studies, mask, workers=0):
    """The videos of all studies as clips below `folder`: dict of (eid, name) to Shown.

    studies: list of PageStudy. Clips are named by what is in them, so that a page made again makes
    none of them again; two names of one recording share a clip.
    """
    found, calls, wanted, done = {}, [], {}, {}
    videos = [(study, name) for study in studies for name in study.names]
    for study, name in progress(videos, desc="sources", unit="video", leave=False, delay=2):
        shown = found[study.eid, name] = Shown(name)
        source = study.source_of(name)
        if source is None:
            continue
        try:
            content = content_digest(source)
        except VideoError as error:
            shown.why = str(error)
            continue
        if study.details.contents.get(name, content) != content:
            shown.why = "the source video has changed since it was embedded"
            continue
        if name not in study.details.contents:
            shown.note = "by its name alone: its embeddings do not say of what video they are"
        key = hashlib.sha256(f"{content} {mask} {__version__}".encode()).hexdigest()[:16]
        clip = f"clips/{key}.webm"
        if clip not in wanted:
            done[clip] = read_playback(folder / clip)
            if not done[clip]:
                calls.append((clip, (write_playback, source, folder / clip, mask)))
        wanted.setdefault(clip, []).append(shown)
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    replies = in_processes(calls, decoders(workers)) if calls else ()
    for clip, (reply, _) in progress(replies, desc="clips", unit="video", total=len(calls)):
        done[clip] = reply
        if isinstance(reply, Playback):
            write_text((folder / clip).with_suffix(".json"), json.dumps(asdict(reply)))
    for clip, same in wanted.items():
        for shown in same:
            tell_clip(shown, clip, done[clip])
    return found


def read_playback(path):
    """The Playback of a clip of an earlier page; None where its record is damaged or gone."""
    try:
        data = path.with_suffix(".json").read_bytes()
        there = TypeAdapter(Playback).validate_json(data)
    except (OSError, ValueError):
        return None
    sides = there.width, there.height
    good = 0 < min(sides) <= max(sides) <= LONGEST_SIDE and RATES[0] <= there.rate <= RATES[1]
    return there if good and 0 < there.frames <= FRAMES and path.is_file() else None


def tell_clip(shown, clip, reply):
    """Take a clip's Playback, or the VideoError that says why there is none."""
    if isinstance(reply, VideoError):
        shown.why = str(reply)
        return
    shown.clip, shown.frames, shown.rate = clip, reply.frames, reply.rate
    shown.width, shown.height = reply.width, reply.height
    shown.rate_shown = f"{reply.rate:.3g}"
    if not reply.rate_is_known:
        told = "its file does not say how fast it plays"
        shown.note = "; ".join(filter(None, [shown.note, told]))


# ----------------------------------------------------------------------------------------- studies


@dataclass
class PageStudy:
    """What the page is told of a study."""

    eid: str
    row: dict  # of the prediction table
    names: list[str]  # of its videos, in the order of the embeddings
    unit: dict | None = None  # `attribution.explain_study`
    truths: np.ndarray | None = None  # (T,) in physical units
    details: StudyDetails = field(default_factory=StudyDetails)
    source: object = None  # the `studies.Study` that its videos are of, where it is at hand

    @cached_property
    def files(self):
        """The source's videos by visible name, and by its last part where these differ."""
        if self.source is None:
            return {}
        whole = {visible(video): video for video in self.source.videos}
        last = {}
        for name, video in whole.items():
            last.setdefault(PurePosixPath(name).name, []).append(video)
        return {name: v[0] for name, v in last.items() if len(v) == 1} | whole

    def source_of(self, name):
        """The path or paths of a video's file; None where it is not at hand."""
        video = self.files.get(name)
        return None if video is None else self.source.source(video)


@dataclass
class Page:
    """All that the page says."""

    folder: Path
    model: object  # a LoadedModel
    settings: object
    studies: list[PageStudy]
    left_out: dict[str, str]
    plain: dict = field(default_factory=dict)  # label -> what a reader calls it

    @property
    def labelled(self):
        return any(s.truths is not None and not np.isnan(s.truths).all() for s in self.studies)


def write_page(page):
    """Write it; returns the path of index.html. A page that was there is replaced file by file."""
    import jinja2

    folder = page.folder
    clips = write_clips(folder, page.studies, page.settings.page_mask, page.settings.workers)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    for name in ("page.css", "page.js"):
        with atomic_path(folder / name) as temporary:
            shutil.copyfile(TEMPLATES / name, temporary)
    shown = [tell_study(page, study, clips) for study in page.studies]
    for n, study in enumerate(shown):
        study["href"] = f"studies/{n + 1}.html"
    common = {"model": page.model.folder.name, "labelled": page.labelled, "facts": facts_of(page)}
    common["decides"] = bool(page.model.record.thresholds)
    common["knows_novelty"] = any(study["novelty"] is not None for study in shown)
    common["has_range"] = any(x["width"] is not None for study in shown for x in study["labels"])
    method = page.settings.explain_method
    explained = any(study.unit for study in page.studies)
    meaning = MEANING.get(method, MEANING["gradients"]) if explained else ()
    report = environment.get_template("page_study.html")
    for n, study in enumerate(shown):
        before = f"{n}.html" if n else ""
        after = f"{n + 2}.html" if n + 1 < len(shown) else ""
        hidden = sum(1 for label in study["labels"] if label["explained"] and not label["details"])
        more = f"{hidden} more labels: see the table, or name them with --explain_tasks"
        text = report.render(
            common, up="../", study=study, before=before, after=after, meaning=meaning,
            more=more if hidden else "",
        )  # fmt: skip
        write_text(folder / study["href"], text)
    listing = environment.get_template("page_list.html")
    left_out = [tuple(map(printable, pair)) for pair in page.left_out.items()]
    text = listing.render(
        common, up="", studies=shown, left_out=left_out,
        labels=[f"{x} ({page.plain[x]})" if page.plain.get(x) else x for x in page.model.labels],
        data=[list_data(study) for study in shown],
    )  # fmt: skip
    write_text(folder / "index.html", text)
    for old in (folder / "studies").glob("*.html"):  # of a longer list that was here before
        if old.stem.isdecimal() and int(old.stem) > len(shown):
            old.unlink()
    used = {Path(clip.clip).stem for clip in clips.values() if clip.clip}
    for old in (folder / "clips").iterdir():  # masked otherwise, or of studies that are gone
        if re.fullmatch(r"[0-9a-f]{16}", old.stem) and old.stem not in used:
            old.unlink()
    return folder / "index.html"


def write_text(path, text):
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def facts_of(page):
    settings, facts = page.settings, [f"EchoFocus {__version__}", f"model {page.model.folder.name}"]
    if any(study.unit for study in page.studies):
        facts.append(f"scores by {settings.explain_method}")
        if settings.explain_method not in ("leave_one_out", "attention"):
            facts.append(f"baseline {settings.baseline}")
    masked = settings.page_mask == "sector"
    return [*facts, "clips masked to the ultrasound sector" if masked else "clips not masked"]


def list_data(study):
    """What the list's script sorts and filters a study by."""
    keys = ("value", "shown", "width", "width_shown", "decision", "right", "truth", "truth_shown")
    names = [video.name for video in study["videos"]]
    text = " ".join([study["eid"], study["warning"], *names]).lower()
    labels = []
    for label in study["labels"]:
        top = label["top"][0][0].clip if label["top"] else ""
        labels.append({k: label[k] for k in keys} | {"thumb": top or study["thumb"]})
    return {
        "eid": study["eid"], "text": text, "novelty": study["novelty"], "warned": study["unlike"],
        "videos": len(names), "labels": labels,
    }  # fmt: skip


def tell_study(page, study, clips):
    """A PageStudy as the templates take it."""
    row, model = study.row, page.model
    videos = [clips[study.eid, name] for name in study.names]
    labels = [tell_label(page, study, i, videos) for i in range(len(model.labels))]
    explained = [label for label in labels if label["explained"]]
    for label in sorted(explained, key=lambda x: -x["clarity"])[:DETAILED]:
        label["details"] = True
    novelty = number(row.get("novelty"))
    warning = row.get("warning", "")
    tops = [label["top"][0][0].clip for label in explained if label["top"]]
    thumb = next(filter(None, [*tops, *(video.clip for video in videos)]), "")
    return {
        "eid": study.eid, "labels": labels, "videos": videos, "n_clips": row["n_clips"],
        "novelty": novelty, "novelty_shown": "" if novelty is None else f"{100 * novelty:.0f} %",
        "unlike": novelty is not None and novelty > UNUSUAL, "warning": warning,
        "warnings": [text for text in warning.split("; ") if text],
        "skipped": study.details.skipped, "thumb": thumb, "more": more_answers(model, row),
    }  # fmt: skip


def more_answers(model, row):
    """What the table says beside the outputs: [(what, answer)], the most probable class of each
    label that has classes, and the probabilities of survival."""
    found = [(f"{label}, most probable class", row.get(label))
             for label in model.outputs.of_kind("multiclass")]  # fmt: skip
    for label in model.outputs.of_kind("survival"):
        start = f"{label}_survival_"
        found += [(f"no {label} until {name.removeprefix(start)}", percent(value))
                  for name, value in row.items()
                  if name.startswith(start) and number(value) is not None]  # fmt: skip
    return [(what, answer) for what, answer in found if answer]


# ------------------------------------------------------------------------------------------ labels


def number(value):
    """A finite number, or None."""
    return None if value is None or not np.isfinite(value) else float(value)


def percent(share):
    return f"{100 * share:.1f} %"


def shown_value(model, value, label):
    """A probability in percent, or a value with its unit."""
    if number(value) is None:
        return ""
    if model.kind(label) == "binary":
        return percent(value)
    unit = "log hazard" if model.kind(label) == "survival" else model.unit(label)
    return f"{value:#.4g} {unit}".strip().replace(". ", " ").removesuffix(".")


def tell_label(page, study, i, videos):
    """A label of a study as the templates take it."""
    model, unit = page.model, study.unit
    label = model.labels[i]
    suffix = f" [{model.unit(label)}]" if model.unit(label) else ""
    value, low, high = (number(study.row.get(f"{label}{e}{suffix}")) for e in ("", "_low", "_high"))
    threshold = model.record.thresholds.get(label)
    decision = None if threshold is None or value is None else bool(value >= threshold)
    truth = None if study.truths is None else number(study.truths[i])
    told = {
        "name": label,
        "plain": page.plain.get(label, ""),
        "number": i,
        "value": value,
        "width": None,
        "decision": decision,
    }
    told |= {"value_shown": shown_value(model, value, label), "range_shown": ""}
    told |= {"width_shown": "", "without_shown": "", "truth": truth, "truth_shown": None}
    told |= {"right": None, "details": False, "top": [], "bottom": []}
    told["threshold_shown"] = "" if threshold is None else shown_value(model, threshold, label)
    if low is not None and high is not None:
        told["width"] = high - low
        told["range_shown"] = (
            f"{shown_value(model, low, label)} to {shown_value(model, high, label)}"
        )
        told["width_shown"] = shown_value(model, high - low, label)
    told["shown"] = told["value_shown"] + (
        f" ({told['range_shown']})" if told["range_shown"] else ""
    )
    if truth is not None:
        binary = model.kind(label) == "binary"
        told["truth_shown"] = ("present" if truth else "absent") if binary else shown_value(
            model, truth, label
        )  # fmt: skip
        told["right"] = None if decision is None else decision == bool(truth)
    told["explained"] = bool(unit) and i in unit["columns"]
    if told["explained"]:  # the only video has no score where it would have to be left out
        told["explained"] = bool(np.isfinite(unit["scores"][unit["columns"].index(i)]).all())
    told["clarity"] = -i  # measurements in their order, findings the clearest first
    if model.kind(label) == "binary":
        cut = 0.5 if threshold is None else threshold
        told["clarity"] = -1 if value is None else abs(value - cut)
    if told["explained"]:
        told |= explained_label(page, study, i, videos)
    return told


def explained_label(page, study, i, videos):
    """What the attribution of one label adds: the waterfall, the top and bottom videos."""
    model, unit, settings = page.model, study.unit, page.settings
    label, k = model.labels[i], unit["columns"].index(i)
    factor, name = score_unit(model, label, settings)
    scores = factor * unit["scores"][k].sum(1, dtype=np.float64)  # (V,)
    without = model.readable(unit["without"])[:, i]
    order, words = np.argsort(-scores, kind="stable"), words_for(model, label, settings)

    def player(v):
        word = words["up" if scores[v] >= 0 else "down"]
        told = {"positive": scores[v] >= 0, "shown": f"{word} {abs(scores[v]):.3g} {name}"}
        told["without"] = shown_value(model, without[v], label)
        told["clips"] = marks(study.details, videos[v], factor * unit["scores"][k][v])
        return videos[v], told

    known = without[np.isfinite(without)]
    ends = [shown_value(model, x, label) for x in (known.min(), known.max())] if len(known) else []
    return {
        "without_shown": " to ".join(dict.fromkeys(ends)),
        "top": [player(v) for v in order[:PLAYERS] if scores[v] > 0],
        "bottom": [player(v) for v in order[::-1][:PLAYERS] if scores[v] < 0],
        "top_title": words["top"],
        "bottom_title": words["bottom"],
        "waterfall": waterfall(page, study, i, scores, without, name),
    }


def words_for(model, label, settings):
    """How a score of either sign is spoken of, and the headings of the top and bottom videos."""
    if settings.explain_method == "attention":
        return {"up": "●", "down": "○", "top": "Looked at most", "bottom": ""}
    if settings.explain_mode == "loss":
        what = {"top": "Raised the loss most", "bottom": "Lowered the loss most"}
        return what | {"up": "▲ raised it by", "down": "▼ lowered it by"}
    if model.kind(label) == "binary":
        what = {"top": "Counted most for", "bottom": "Counted most against"}
        return what | {"up": "▲ for", "down": "▼ against"}
    what = {"top": "Raised the value most", "bottom": "Lowered the value most"}
    return what | {"up": "▲ raised it by", "down": "▼ lowered it by"}


def marks(details, video, scores):
    """Where the clips of a video lie on its time line, in percent; the one that counted most, in
    the direction that the video did, is `best`."""
    starts = details.starts.get(video.name)
    if starts is None or not video.frames or len(starts) != len(scores):
        return []
    first = first_frames(starts)
    best = int(np.argmax(scores if scores.sum() >= 0 else -scores))
    found = []
    for c in np.unique(np.append(np.unique(first, return_index=True)[1], best)):
        end = min(first[c] + details.clip_len, video.frames)
        title = f"frames {first[c] + 1} to {end}: {scores[c]:+.3g}"
        found.append({
            "left": round(100 * first[c] / video.frames, 3), "best": c == best, "title": title,
            "width": round(100 * (end - first[c]) / video.frames, 3),
        })  # fmt: skip
    return found


LEFT, WIDTH, STEP = 185, 385, 22  # of the waterfall, in its own units


def waterfall(page, study, i, scores, without, unit_name):
    """From the baseline to the answer, a bar a video, the largest score first.

    Where scores do not add up (leave_one_out, attention) each bar begins at 0.
    """
    model, settings, label = page.model, page.settings, page.model.labels[i]
    adds_up = settings.explain_method not in ("leave_one_out", "attention")
    k = study.unit["columns"].index(i)
    order = np.argsort(-scores, kind="stable")
    rows = [(study.names[v], scores[v], shown_value(model, without[v], label)) for v in order]
    if len(rows) > BARS:
        strong = np.sort(np.argsort(-np.abs(scores[order]), kind="stable")[: BARS - 1])
        rest = [n for n in range(len(rows)) if n not in set(strong.tolist())]
        others = f"{len(rest)} other videos", float(sum(rows[n][1] for n in rest)), ""
        place = int(np.searchsorted(-scores[order][strong], -others[1]))
        rows = [rows[n] for n in strong]
        rows.insert(place, others)
    ends = 0.0, 0.0
    loss = settings.explain_mode == "loss"
    if adds_up and not loss:
        ends = tuple(float(study.unit[x][0, i]) for x in ("baseline", "answer"))
        factor, _ = score_unit(model, label, settings)
        ends = tuple(factor * x for x in ends)
    at, levels = ends[0], [ends[0]]
    for _, score, _ in rows:
        levels.append((at if adds_up else 0.0) + score)
        at = levels[-1] if adds_up else 0.0
    low, high = min([*levels, *ends]), max([*levels, *ends])
    scale = WIDTH / (high - low or 1)
    x = lambda value: round(LEFT + (value - low) * scale, 1)  # noqa: E731
    bars = []
    if adds_up:
        start = (
            "" if loss else shown_value(model, model.readable(study.unit["baseline"])[0, i], label)
        )
        bars.append(
            {"kind": "end", "name": "baseline", "x": x(ends[0]), "shown": start, "without": ""}
        )
    at = ends[0]
    for name, score, rest in rows:
        kind = "rest" if name.endswith(" other videos") and not rest else (
            "for" if score >= 0 else "against"
        )  # fmt: skip
        bars.append({
            "kind": kind, "name": shortened(name), "x": min(x(at), x(at + score)),
            "width": max(abs(x(at + score) - x(at)), 1), "link": x(at + score) if adds_up else None,
            "shown": f"{'▲' if score >= 0 else '▼'} {score:+.3g}",
            "without": rest and f"without {rest}", "title": f"{name}: {score:+.3g} {unit_name}",
        })  # fmt: skip
        at = at + score if adds_up else 0.0
    if adds_up:
        end = shown_value(model, model.readable(study.unit["answer"])[0, i], label)
        end = f"loss {study.unit['losses'][i]:.3g}" if loss else end
        bars.append({"kind": "end", "name": "answer", "x": x(at), "shown": end, "without": ""})
    for n, bar in enumerate(bars):
        bar["y"] = 4 + STEP * n
    told = ", ".join(f"{bar['name']} {bar['shown'].lstrip('▲▼ ')}" for bar in bars)
    error = float(study.unit["error"][k])
    caption = f"Scores in {unit_name}"
    if adds_up:
        caption += ", from the answer at the baseline to this study's; they miss it by "
        caption += f"{percent(error)} of their summed sizes"
    return {
        "bars": bars, "height": 8 + STEP * len(bars), "caption": caption + ".",
        "zero": None if adds_up else x(0.0), "told": f"Videos by score for {label}: {told}",
    }  # fmt: skip


def shortened(name, longest=26):
    return name if len(name) <= longest else "…" + name[-longest + 1 :]
