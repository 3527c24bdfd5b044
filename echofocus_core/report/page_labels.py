"""The answers of a study for the templates of the page: texts, and positions on axes."""

from dataclasses import dataclass

import numpy as np

from echofocus_core.study.explanations import label_explanation
from echofocus_core.video.decode import first_frames

MAX_BARS = 16  # of a waterfall; the videos with the smallest scores share one bar
MAX_CARDS = 4  # videos of a label that are shown, the most important ones
KINDS = ("binary", "regression", "survival")  # in the order of the page


def number(value):
    """A finite number, or None."""
    return None if value is None or not np.isfinite(value) else float(value)


def percent(share):
    return fixed(100 * share, 1) + "\u00a0%"


def fixed(value, decimals):
    """A number with so many decimals and a true minus, never -0.0."""
    value = round(float(value), decimals) + 0.0
    return f"{value:.{decimals}f}".replace("-", "\u2212")


def signed(value, decimals):
    text = fixed(value, decimals)
    return text if text.startswith("\u2212") or not float(text) else "+" + text


def title_of(page, output):
    """(Label of an output in plain words, else its name; class of a grade, or '')."""
    label = page.model.outputs.by_output[output]
    words = page.plain.get(output) or page.plain.get(label.name, "")
    title = words[:1].upper() + words[1:] or (label.name if label.classes else output)
    return title, output.removeprefix(f"{label.name}_") if label.classes else ""


@dataclass
class LabelView:
    """One output of a study for the templates; missing values are None."""

    name: str
    title: str  # in plain words, or its name; a class of a grade
    grade: str  # the title of the class's label, or ''
    number: int
    kind: str
    unit: str
    value: float | None
    low: float | None
    high: float | None
    threshold: float | None
    truth: float | None
    one_clip: bool  # whether its study has one clip of each video
    details: dict | None = None  # of its explanation, for the script
    sentence: str = ""  # the answer and the video it most depends on
    top_video: int | None = None  # the most important video
    is_open: bool = False
    is_top: bool = False  # whether it is the most probable class of its grade
    first: int = -1  # the number of its grade's first class

    @property
    def decimals(self):
        """Of all values of this label: one of percentages, else for three digits of the answer."""
        if self.kind == "binary" or self.unit == "%":
            return 1
        size = abs(self.value or 0)
        return 2 if not size else int(np.clip(2 - np.floor(np.log10(size)), 0, 4))

    def text(self, value):
        """A probability in percent, or a value with its unit; '' if missing."""
        if number(value) is None:
            return ""
        if self.kind == "binary":
            return percent(value)
        return f"{fixed(value, self.decimals)}\u00a0{self.unit}".strip()

    @property
    def width(self):
        return None if self.low is None or self.high is None else self.high - self.low

    @property
    def range_text(self):
        if self.width is None:
            return ""
        ends = self.text(self.low), self.text(self.high)
        if ends[0] == ends[1]:
            return "one clip only" if self.one_clip else "no difference"
        return f"{ends[0].removesuffix(self.unit).strip()} to {ends[1]}"

    @property
    def truth_text(self):
        if self.truth is None or self.kind != "binary":
            return self.text(self.truth)
        return "present" if self.truth else "absent" if not self.grade else ""

    @property
    def decision(self):
        """Whether a finding is present, or a class is the most probable; None if unknown."""
        if self.grade:
            return self.is_top
        unknown = self.threshold is None or self.value is None
        return None if unknown else self.value >= self.threshold

    @property
    def right(self):
        unknown = self.decision is None or self.truth is None or (self.grade and not self.is_top)
        return None if unknown else self.decision == bool(self.truth)

    @property
    def order(self):
        """Sort key: findings that are present, then by answer; grades, their classes by answer;
        other kinds in their order."""
        kind = KINDS.index(self.kind) if self.kind in KINDS else len(KINDS)
        if self.kind != "binary":
            return kind, 0, 0, self.number
        return kind, self.first, not self.decision, -1 if self.value is None else -self.value

    def list_data(self):
        """Its values and texts for the script of the list."""
        binary = [x if x is None else int(x) for x in (self.decision, self.right)]
        places = [x if x is None else round(x, 4) for x in (self.value, self.width)]
        texts = [self.text(self.value), self.range_text, self.truth_text]
        return [*places, self.threshold, self.truth, *binary, *texts]


def label_view(page, study, i):
    """LabelView of output i of a PageStudy."""
    model, label, row = page.model, page.model.outputs.names[i], study.row
    unit = model.unit(label)
    ending = f" [{unit}]" if unit else ""
    value, low, high = (number(row.get(f"{label}{part}{ending}")) for part in ("", "_low", "_high"))
    title, class_name = title_of(page, label)
    view = LabelView(
        label, class_name or title, title * bool(class_name), i, model.kind(label), unit,
        value, low, high,
        model.record.thresholds.get(label),
        None if study.truths is None else number(study.truths[i]),
        row["n_clips"] == len(study.names),
    )  # fmt: skip
    if view.grade:
        classes = model.outputs.by_output[label].outputs
        answers = [number(row.get(name)) for name in classes]
        view.first = model.outputs.names.index(classes[0])
        view.is_top = None not in answers and label == classes[int(np.argmax(answers))]
    explanation, columns = None, study.explanation["columns"] if study.explanation else ()
    if i in columns:
        k = columns.index(i)
        explanation = label_explanation(model, study.explanation, k, page.settings)
        view.details = details_of(page.settings, view, explanation)
    view.sentence = sentence_of(study, view, explanation)
    return view


def sentence_of(study, view, explanation):
    """'VSD 92.0 % (threshold 60.0 %): present. Most depends on PSAX: without it 76.0 %.'"""
    name = f"{view.grade}: {view.title}" if view.grade else view.title
    text = f"{name} {view.text(view.value) or 'has no answer'}"
    if view.kind == "survival":
        text += " (log hazard)"
    if view.grade:
        text += " (the most probable class)" * view.is_top
    elif view.decision is not None:
        verdict = "present" if view.decision else "absent"
        text += f" (threshold {view.text(view.threshold)}): {verdict}"
    if explanation is None:
        return f"{text}."
    without = [view.text(x) for x in explanation.without]
    if not any(without):
        return f"{text}. It rests on one video."
    view.top_video = top = by_importance(explanation)[0]
    if set(without) == {view.text(view.value)}:
        return f"{text}. No single video changes it."
    name, change = study.videos[top].shown, explanation.answer - explanation.without[top]
    if explanation.scores[top] * change < 0:
        made_up = f"but other videos make up for it: without it {without[top]}"
        return f"{text}. Most depends on {name}, {made_up}."
    still = "still " if without[top] == view.text(view.value) else ""
    return f"{text}. Most depends on {name}: without it {still}{without[top]}."


# ----------------------------------------------------------------------------------- explanations


def by_importance(explanation):
    """Numbers of the videos, largest absolute score first: of redundant videos none has an effect
    when it alone is left out. By these effects where scores have no meaning.
    """
    sizes = np.abs(explanation.scores)
    if explanation.fault or not np.isfinite(sizes).all():
        sizes = np.abs(np.nan_to_num(explanation.answer - explanation.without))
    return np.argsort(-sizes, kind="stable").tolist()


def details_of(settings, view, explanation):
    """What the script shows of a LabelExplanation: cards of videos, and the waterfall or a fault.

    cards: [video, number of its best clip] of the most important; without: of each video, the
    answer without it.
    """
    top = by_importance(explanation)[:MAX_CARDS]
    details = {
        "cards": [[v, best_clip(explanation.of_clips[v])] for v in top],
        "without": [view.text(x) for x in explanation.without],
    }
    if explanation.fault:
        return details | {"fault": explanation.fault}
    if np.isfinite(explanation.scores).all():
        details |= waterfall(settings, view, explanation)
    return details


def best_clip(scores):
    """The clip that contributed most in the direction of the video's score, or -1: all alike."""
    if not np.ptp(scores) > 0:
        return -1
    return int(np.argmax(scores if scores.sum() >= 0 else -scores))


def waterfall(settings, view, explanation):
    """The bars of a label and their axis; positions are in percent of its length.

    bars: [video or, for several, minus their number, start, end, score]; ends: [position, text] of
    the reference, where scores add up, and of the answer; ticks: none for an axis from 0 to 100 %.
    """
    x, loss = explanation, settings.explain_mode == "loss"
    decimals = {"loss": 3, "share": 3, "log-odds": 2}.get(x.unit, view.decimals)
    strong = np.argsort(-np.abs(x.scores), kind="stable")
    rows = [(int(v), x.scores[v]) for v in strong]
    if len(rows) > MAX_BARS:
        weak = strong[MAX_BARS - 1 :]
        rows = [*rows[: MAX_BARS - 1], (-len(weak), x.scores[weak].sum())]
    if view.kind == "binary" and x.unit == "points":
        rows = keep_inside(rows, x.ends[0])
    sums = np.concatenate([[0], np.cumsum([score for _, score in rows])])
    ends, in_answers = [], not loss and settings.explain_method != "attention"
    if in_answers and x.adds_up:
        levels = levels_in_answers(view, x, x.ends[0] + sums)
        starts, stops = levels[:-1], levels[1:]
        ends = [x.baseline, x.answer]
    elif in_answers:  # each video from the answer without it
        starts = np.array([x.without[v] if v >= 0 else x.answer for v, _ in rows])
        stops = np.full(len(rows), x.answer)
        ends = [x.answer]
    else:
        starts = sums[:-1] if x.adds_up else 0 * sums[1:]
        stops = starts + [score for _, score in rows]
    shown = [*starts, *stops, *ends]
    low, high, ticks = axis_of(shown, view.kind == "binary" and in_answers)

    def place(value):
        return round(float(np.clip((value - low) / (high - low), 0, 1)) * 100, 1)

    score_text = fixed if x.unit == "share" else signed  # a share has no direction
    tick_text = view.text if in_answers else lambda value: fixed(value, 2)
    bars = [
        [v, place(start), place(stop), score_text(score, decimals)]
        for (v, score), start, stop in zip(rows, starts, stops, strict=True)
    ]
    cut = view.threshold if in_answers else None
    result = {
        "bars": bars, "ticks": [[place(t), tick_text(t)] for t in ticks],
        "ends": [[place(value), view.text(value)] for value in ends],
        "cut": cut if cut is None else place(cut), "unit": x.unit.replace("label's unit", ""),
    }  # fmt: skip
    if x.error >= 0.0005:
        result["check"] = f"check: the scores add up to the change within {percent(x.error)}"
    return {k: v for k, v in result.items() if v not in ([], None)}


def keep_inside(rows, level):
    """Bars (video, points), reordered so that each ends between 0 and 100 % if possible: of those
    that do, the first one is next. level: the probability of the reference in percent."""
    rows, order = list(rows), []
    while rows:
        row = next((row for row in rows if 0 <= level + row[1] <= 100), rows[0])
        rows.remove(row)
        order.append(row)
        level += row[1]
    return order


def levels_in_answers(view, explanation, levels):
    """Sums of scores (n,), in the unit of the scores, as answers.

    A finding: by the logistic function of log-odds; else linear. Both go through the reference and
    the answer exactly, also for averaged models.
    """
    if view.kind == "binary" and explanation.unit == "points":
        return levels / 100
    ends = np.array([explanation.baseline, explanation.answer], float)
    if view.kind == "binary":
        p = np.clip(ends, 1e-7, 1 - 1e-7)
        ends = np.log(p) - np.log1p(-p)
    change = explanation.ends[1] - explanation.ends[0]
    small = abs(change) < 1e-3 * np.abs(explanation.scores).sum()
    slope = 1.0 if small or not change else (ends[1] - ends[0]) / change
    answers = ends[0] + slope * (levels - explanation.ends[0])
    return 1 / (1 + np.exp(-answers)) if view.kind == "binary" else answers


def axis_of(values, is_probability):
    """(low, high, ticks) of an axis: 0 to 1 without ticks, or round numbers around the values."""
    if is_probability:
        return 0.0, 1.0, []
    low, high = np.nanmin(values), np.nanmax(values)
    span = (high - low) or abs(high) or 1.0
    step = 10 ** np.floor(np.log10(span / 2))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= 4)
    first, last = np.floor(low / step), np.ceil(high / step)
    last += first == last
    return first * step, last * step, np.arange(first, last + 1) * step


def clip_marks(details, video):
    """The positions of a video's clips on its timeline in percent: [[left, width]]."""
    starts = details.starts.get(video.name)
    if starts is None or not video.playback:
        return []
    frames, first = video.playback.frames, first_frames(starts)
    length = details.attributes.get("clip_len", 0)
    if "stride" in details.attributes:  # windows, not random starts
        first, length = starts, (length - 1) * details.attributes["stride"] + 1
    widths = np.minimum(first + length, frames) - first
    return np.round(100 * np.column_stack([first, widths]) / frames, 1).tolist()
