"""The page in a real browser: nothing asked of the network, names as text, videos that play."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
from helpers import normal, write_cine

import echofocus as ef
from echofocus_core.base.console import run_main
from echofocus_core.base.options import Settings
from echofocus_core.report.page import Page, PageStudy, write_page
from echofocus_core.report.page_labels import keep_inside, sentence_of
from echofocus_core.study.explanations import explain
from echofocus_core.study.kinds.base import sigmoid
from echofocus_core.study.outputs import Outputs
from echofocus_core.video import decode as video
from echofocus_core.video import phantom
from echofocus_core.video.playback import write_clip
from echofocus_core.video.store import FileRecord, StudyClips, write_study
from echofocus_core.video.studies import Study

pytestmark = pytest.mark.xdist_group("page")  # one process: one page and one browser
HOSTILE = "<img src=x onerror=alert(1) loading=lazy>\"'=1+1"
HOSTILE_LABEL = "</script><script>alert(2)</script> {{ 7 * 7 }}"
METHOD = ("--explain_method", "adaptive")
STUDIES = [HOSTILE, *(f"S{i:02}" for i in range(29))]
STARTS = np.array([0, 4, 7])


def write_cohort():
    """30 studies of two videos in the current folder; the videos of three are available."""
    rows = []
    for i, eid in enumerate(STUDIES):
        finding = i % 2
        bag = normal(i, 2, 3, 768) + 1.5 * finding * normal(999, 768)
        videos = {f"v{k}.avi": (STARTS, [bag[k]]) for k in range(2)}
        attributes = {"clip_len": 8, "n_clips": 3, "size": 64}
        files = {name: FileRecord(frames="16") for name in videos}
        files["note.dcm"] = FileRecord(result="skipped", reason="still <b>image</b>")
        Path("emb").mkdir(exist_ok=True)
        write_study(Path("emb") / f"{eid}.hdf5", videos, attributes, files)
        rows.append({"pid": f"P{i}", "eid": eid, HOSTILE_LABEL: finding, "other": int(i % 3 == 0)})
    for i, eid in enumerate(STUDIES[:3]):
        for k, view in enumerate(("A4C", "PSAX")):
            frames = phantom.phantom_cine(view, shows_defect=True, seed=(i, k))
            phantom.write_video(Path("videos") / eid / f"v{k}.avi", frames, fps=25)
    pd.DataFrame(rows).to_csv("labels.csv", index=False)
    task = {"task_labels": [HOSTILE_LABEL, "other"], "label_path": "labels.csv", "type": "binary"}
    dataset = {"embedding_path": "emb", "video_base_path": "videos"}
    dataset["video_subdir_format"] = "{echo_id}"
    config = {"task": {"t": task}, "dataset": {"d": dataset}}
    Path("config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page of all studies, by the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        write_cohort()
        train = ["train", "--epoch_lim", "1", "--batch_number", "8", "--split", "40,40,20"]
        for line in (train, ["explain", "--subset", "all", "--page", *METHOD]):
            run_main(lambda line=line: ef.main(line), "echofocus.py")
        return Path("trained_models/t/explanation_all_d").resolve()


@pytest.fixture
def tab(chromium):
    """A tab that fails the test for any message on the console and any request but for files."""
    page = chromium.new_page(viewport={"width": 1100, "height": 800})
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("dialog", lambda dialog: (messages.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda request: requests.append(request.url))
    yield page
    page.close()
    assert messages == [] and {url.split(":")[0] for url in requests} <= {"file", "data"}


def shown(tab):
    return tab.locator("#list tbody tr:visible th").all_inner_texts()


def test_list_searches_sorts_and_filters(folder, tab):
    tab.goto((folder / "index.html").as_uri())
    assert sorted(shown(tab)) == sorted(STUDIES) and tab.locator("img[src=x]").count() == 0
    options = tab.locator("#label option").all_inner_texts()
    assert options == [HOSTILE_LABEL, "other"]
    tab.fill("#search", "s0 v1")
    assert shown(tab) == [f"S0{i}" for i in range(10)]
    tab.fill("#search", "onerror")
    assert shown(tab) == [HOSTILE]
    tab.fill("#search", "")

    table = pd.read_csv(folder.parent / "explanation_all_d.csv", dtype={"eid": str})
    answers = table[table["label"] == "other"].groupby("eid")[["prediction", "y_true"]].first()
    tab.select_option("#label", "1")
    for direction in (True, False):
        tab.click("th[data-by=value] button")
        expected = answers["prediction"].sort_values(ascending=direction)
        assert answers.loc[shown(tab), "prediction"].tolist() == pytest.approx(list(expected))
    assert tab.get_attribute("th[data-by=value]", "aria-sort") == "descending"
    cut = ef.load(folder.parent).record.thresholds["other"]
    decided = answers["prediction"] >= cut
    tab.select_option("#decision", "yes")
    assert set(shown(tab)) == set(answers.index[decided])
    tab.select_option("#right", "wrong")
    assert set(shown(tab)) == set(answers.index[decided & (answers["y_true"] == 0)])
    assert f"{len(shown(tab))} of 30" in tab.inner_text("#count")


def test_the_list_shows_the_chosen_labels_top_video(folder, tab):
    open_study(folder, tab, "S00")
    best = [tab.locator(f"#label-{k} .player img").first.get_attribute("src") for k in range(2)]
    answers = [
        tab.locator(f"#label-{k} .effect").first.inner_text().split("without it: ")[1]
        for k in range(2)
    ]
    lead = tab.inner_text(".lead")
    assert any(f"without it {answer}" in lead for answer in answers)
    tab.goto((folder / "index.html").as_uri())
    tab.fill("#search", "s00")
    for k in (0, 1, 0):
        tab.select_option("#label", str(k))
        image = tab.locator("#list tbody tr:visible img")
        assert best[k] == "../" + image.get_attribute("src")
    image.hover(force=True)
    assert tab.locator("#list video").get_attribute("src") == best[0][3:-4] + ".webm"


def test_filters_of_decisions_are_for_labels_that_have_them(folder, tab, tmp_path):
    """A measurement has none: the filter would hide every study."""
    model = ef.load(folder.parent)
    del model.record.thresholds["other"]
    row = {"n_clips": 3, "warning": "", "other": 0.7, HOSTILE_LABEL: 0.9}
    studies = [PageStudy(eid, row | {"eid": eid}, ["v0.avi"]) for eid in "ab"]
    tab.goto(write_page(Page(tmp_path / "p", model, Settings(), studies, {})).as_uri())
    tab.select_option("#decision", "no")
    assert shown(tab) == [] and tab.locator("#right").is_disabled()
    tab.select_option("#label", "1")
    assert shown(tab) == ["a", "b"] and tab.locator("#decision").is_disabled()
    tab.select_option("#label", "0")
    assert shown(tab) == ["a", "b"] and tab.locator("#decision").is_enabled()


def open_study(folder, tab, eid):
    tab.goto((folder / "index.html").as_uri())
    tab.locator("#list tbody a", has_text=eid).click()
    tab.wait_for_selector("h1")


def test_a_study_shows_names_as_text(folder, tab):
    open_study(folder, tab, HOSTILE)
    assert tab.inner_text("h1") == f"Study {HOSTILE}"
    assert HOSTILE_LABEL in tab.inner_text(".answers")
    assert "still <b>image</b>" in tab.inner_text("body")
    assert "not a medical device" in tab.inner_text("footer")
    rows = tab.locator(".waterfall").first.locator("tbody th").all_inner_texts()
    assert rows[0] == "reference" and rows[-1] == "answer"
    assert sorted(rows[1:-1]) == ["v0.avi", "v1.avi"]
    tab.keyboard.press("n")
    tab.wait_for_url("**/2.html")
    tab.go_back()


def test_videos_play_step_and_slow_down(folder, tab):
    open_study(folder, tab, "S00")
    player = tab.locator(".player[data-autoplay]").first
    film = player.locator("video").element_handle()
    tab.wait_for_function("v => v.currentTime > 0.1 && !v.paused && v.loop", arg=film)
    assert film.evaluate("v => v.duration") == pytest.approx(16 / 25, abs=0.05)
    player.locator("select").select_option("0.25")
    assert film.evaluate("v => v.playbackRate") == 0.25
    player.locator(".play").click()
    tab.wait_for_function("v => v.paused", arg=film)
    line = player.locator(".timeline")
    line.press("Home")
    for expected in (2, 3):
        player.locator(".on").click()
        assert f"{expected} of 16" in player.inner_text()
    line.press("ArrowLeft")
    assert line.get_attribute("aria-valuenow") == "2"
    for _ in range(2):
        player.locator(".back").click()
    assert "16 of 16" in player.inner_text()  # a loop


def test_the_clip_that_counted_most_is_marked(folder, tab):
    import h5py

    open_study(folder, tab, "S00")
    with h5py.File(folder.parent / "explanation_all_d.clips.h5") as f:
        labels, scores = f["S00/labels"].asstr()[:].tolist(), f["S00/scores"][:]
    section = tab.locator("details.label").first
    k = labels.index(section.locator(".name").inner_text())
    assert section.locator(".clip.best").count() == 2
    for player in section.locator(".player").all():
        clips = scores[k][["v0.avi", "v1.avi"].index(player.locator("strong").inner_text())]
        best = np.argmax(clips if clips.sum() >= 0 else -clips)
        style = player.locator(".clip.best").get_attribute("style")
        left, width = (float(x.split(":")[1].strip("% ")) for x in style.strip(";").split(";")[:2])
        first = max(STARTS[best] - 1, 0)
        assert left == pytest.approx(100 * first / 16, abs=0.1)
        assert width == pytest.approx(50, abs=0.1)


def test_pixels_in_the_browser_are_those_of_the_video(folder, tab):
    open_study(folder, tab, "S01")
    player = tab.locator("#videos .player").nth(1)
    player.scroll_into_view_if_needed()
    frames = video.read_frames(folder.parents[2] / "videos" / "S01" / "v1.avi")
    alike = []
    for number in (0, 5, 11):
        line = player.locator(".timeline")
        line.press("Home")
        for _ in range(number):
            line.press("ArrowRight")
        tab.wait_for_function(
            "v => !v.seeking && v.readyState > 1", arg=player.locator("video").element_handle()
        )
        for _ in range(8):  # on a busy machine the frame is painted after the end of the seek
            tab.wait_for_timeout(250)
            data = np.frombuffer(player.locator("video").screenshot(), np.uint8)
            image = cv2.resize(cv2.imdecode(data, cv2.IMREAD_COLOR), (160, 120))[10:110, 10:150]
            each = [np.corrcoef(image.ravel(), f[10:110, 10:150].ravel())[0, 1] for f in frames]
            if np.argmax(each) == number:
                break
        alike.append(each)
    assert np.argmax(alike, axis=1).tolist() == [0, 5, 11] and np.max(alike, axis=1).min() > 0.93


def test_a_source_that_is_gone_has_a_stand_in(folder, tab):
    open_study(folder, tab, "S20")
    assert "the source video is not available" in tab.inner_text("#videos > p")
    assert tab.locator("video").count() == 0


def test_values_that_no_study_has_get_no_column(folder, tab, tmp_path):
    """An empty column of novelty would look like nothing unusual."""
    row = {"eid": "a", "n_clips": 1, "warning": "", "other": 0.7, HOSTILE_LABEL: 0.1}
    heads = []
    for more in ({}, {"novelty": 0.5, "other_low": 0.7, "other_high": 0.7}):
        page = Page(tmp_path / "p", ef.load(folder.parent), Settings(), [
            PageStudy("a", row | more, ["v0.avi"])], {})  # fmt: skip
        tab.goto(write_page(page).as_uri())
        heads.append(tab.locator("#list thead th").all_inner_texts())
        assert tab.locator("#novelty").is_disabled() == (not more)
        tab.select_option("#label", "1")
        assert shown(tab) == ["a"] and "70.0\u00a0%" in tab.inner_text("#list")
        tab.goto((tmp_path / "p/studies/1.html").as_uri())
        assert "1 video, 1 clip" in tab.inner_text("main").replace("clips", "")
        assert ("one clip only" in tab.inner_text("main")) == bool(more)
        assert ("on 15 patients: too few to judge" in tab.inner_text("main")) == (not more)
    assert heads[0] == ["Top video", "Study", "Answer", "Decision", "Videos", "Warnings"]
    assert {"90\u00a0% range", "More unusual than"} == set(heads[1]) - set(heads[0])


def test_the_only_video_cannot_be_left_out(folder, tab, tmp_path):
    """It has no score by leave_one_out, and so no waterfall."""
    model, settings = ef.load(folder.parent), Settings(explain_method="leave_one_out")
    bag = StudyClips(np.random.default_rng(0).normal(size=(1, 3, 768)), ["v0.avi"], {})
    row = {"eid": "a", "n_clips": 3, "warning": "", "other": 0.7, HOSTILE_LABEL: 0.1}
    studies = [PageStudy("a", row, ["v0.avi"], explain(model, "a", bag, [0, 1], settings))]
    write_page(Page(tmp_path / "p", model, settings, studies, {}))
    tab.goto((tmp_path / "p/studies/1.html").as_uri())
    assert tab.locator(".waterfall").count() == 0 and "nan" not in tab.inner_text("main")
    assert tab.locator("details .player").count() == 2


def test_shapley_values_start_from_the_answer_for_no_videos(folder, tab, tmp_path):
    model, settings = ef.load(folder.parent), Settings(explain_method="shapley")
    bag = StudyClips(np.random.default_rng(0).normal(size=(2, 3, 768)), ["v0.avi", "v1.avi"], {})
    explanation = explain(model, "a", bag, [0, 1], settings)
    row = {"eid": "a", "n_clips": 6, "warning": "", "other": 0.7, HOSTILE_LABEL: 0.1}
    studies = [PageStudy("a", row, bag.videos, explanation)]
    write_page(Page(tmp_path / "p", model, settings, studies, {}))
    tab.goto((tmp_path / "p/studies/1.html").as_uri())
    assert tab.locator(".waterfall").count() == 2
    empty = model.readable(model.mean_answer[None])[0, 0]
    assert f"{100 * empty:.1f}" in tab.locator("#label-0 .waterfall").text_content()
    text = tab.locator("body").text_content()
    assert "Shapley value" in text and "mean answer in the training fold" in text
    assert "baseline zero" not in text


# Elements whose text is cut or outside the window, and texts with too little contrast.
FAULTS = (Path(__file__).parent / "page_faults.js").read_text()
MANY = [f"finding_{i}" for i in range(22)]


def many_labels(folder, n_studies, names=("A4C.avi", "PSAX.avi", "v0.avi")):
    """(model, studies) with 22 findings and random explanations; label 5 is the only one present,
    and rests on the first video."""
    model, rng, videos = ef.load(folder.parent), np.random.default_rng(0), list(names)
    model.outputs = Outputs.of(MANY, "binary")
    model.record = model.record.model_copy(
        update={"thresholds": dict.fromkeys(MANY, 0.6), "unlearnt": []}
    )
    studies, V = [], len(names)
    for n in range(n_studies):
        scores = rng.normal(0, 0.3, (22, V))
        scores[5] = [3.0] + [0.1] * (V - 1)
        baseline = np.full((1, 22), -2.0)
        answer = baseline + scores.sum(1)
        row = {"eid": f"study {n}", "n_clips": 2 * V, "warning": "", "novelty": 0.94}
        for label, p in zip(MANY, sigmoid(answer[0]), strict=True):
            row |= {label: p, f"{label}_low": p / 2, f"{label}_high": (1 + p) / 2}
        explanation = {
            "eid": f"study {n}", "columns": list(range(22)), "videos": videos, "answer": answer,
            "baseline": baseline, "baseline_name": "the mean answer in the training fold",
            "without": answer - scores.T, "scores": np.repeat(scores[..., None] / 2, 2, 2),
            "absolute": abs(scores), "standard_error": 0 * scores, "error": np.zeros(22),
            "ends": np.stack([baseline[0], answer[0]], 1), "losses": np.zeros(22),
        }  # fmt: skip
        source = Study("S00", folder.parents[2] / "videos" / "S00", ["v0.avi"])
        truths = (rng.random(22) < 0.3).astype(float)
        studies.append(PageStudy(f"study {n}", row, videos, explanation, truths, source=source))
    return model, studies


@pytest.fixture(scope="module")
def many(folder, tmp_path_factory):
    """A page with 22 labels; the first study and two of its files are named like a patient."""
    model, studies = many_labels(folder, 3)
    first = studies[0]
    first.eid = first.row["eid"] = "2024-03-12 M\u00fcller"
    first.names = ["A4C.avi", "MUELLER_ANNA/PSAX.avi", "v0.avi"]
    first.row["warning"] = "almost the same: v0.avi and MUELLER_ANNA/PSAX.avi"
    first.details.files = {
        "M\u00fcller.pdf": FileRecord(result="skipped", reason="is M\u00fcller.pdf")
    }
    plain = {"finding_5": "ventricular septal defect of the muscular part"}
    page = Page(tmp_path_factory.mktemp("many") / "p", model, Settings(), studies, {}, plain)
    return write_page(page).parent


@pytest.mark.parametrize("size", [1280, 390, "A4", "Letter"])
def test_nothing_is_cut_or_pale_at_any_size(folder, many, tab, size):
    """On screens light and dark, and on paper 12 mm inside its edges."""
    paper = {"A4": 703, "Letter": 725}.get(size)
    tab.set_viewport_size({"width": paper or size, "height": 800})
    for path in (many / "studies/1.html", folder / "studies/2.html", many / "index.html"):
        tab.goto(path.as_uri())
        tab.wait_for_function("[...document.images].every(x => x.complete || x.loading == 'lazy')")
        if paper:
            tab.emulate_media(media="print")
            tab.evaluate("dispatchEvent(new Event('beforeprint'))")
        elif path.parent.name == "studies":
            tab.locator("summary.row").first.click()
        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme, media="print" if paper else "screen")
            assert tab.evaluate(FAULTS) == [], path
        tab.emulate_media(media="screen")


def test_the_sentence_does_not_contradict_itself():
    """A video with the largest score, without which the answer moves the other way."""
    videos = [SimpleNamespace(shown="PSAX"), SimpleNamespace(shown="A4C")]
    view = SimpleNamespace(
        title="VSD", grade="", kind="binary", value=0.9, threshold=0.6, decision=True,
        text=lambda x: f"{100 * x:.0f} %",
    )  # fmt: skip
    explanation = SimpleNamespace(
        scores=np.array([30.0, 5.0]), answer=0.9, without=np.array([0.95, 0.8]), fault=""
    )
    start = "VSD 90 % (threshold 60 %): present. Most depends on PSAX"
    sentence = sentence_of(SimpleNamespace(videos=videos), view, explanation)
    assert sentence == f"{start}, but other videos make up for it: without it 95 %."
    explanation.without[0] = 0.7
    sentence = sentence_of(SimpleNamespace(videos=videos), view, explanation)
    assert sentence == f"{start}: without it 70 %."


def test_many_labels_are_in_the_order_of_their_answers(many, tab):
    tab.goto((many / "studies/2.html").as_uri())
    answers = [
        float(x.split("\u00a0")[0]) for x in tab.locator("summary .answer").all_inner_texts()
    ]
    assert len(answers) == 22 and answers == sorted(answers, reverse=True)
    opened = tab.locator("details[open] .name").all_inner_texts()
    assert opened == ["Ventricular septal defect of the muscular part finding_5"]
    lead = tab.inner_text(".lead")
    assert lead.startswith(f"Ventricular septal defect of the muscular part {answers[0]}\u00a0% (")
    assert "present. Most depends on A4C.avi: without it " in lead
    assert "more unusual than 94\u00a0% of the training studies" in tab.inner_text("main")
    cards = tab.locator("details[open] .player")
    assert cards.count() == 3 and len({card.bounding_box()["y"] for card in cards.all()}) == 1
    bars = tab.locator("details[open] .track :is(.end, .for, .against)")
    places = bars.evaluate_all("x => x.map(bar => parseFloat(bar.style.left))")
    expected = 100 * sigmoid(np.array([-2, -2, 1, 1.1, 1.2]))  # on an axis of probability
    assert places == pytest.approx(expected, abs=0.06)
    tab.click("details[open] summary")
    assert tab.evaluate("document.querySelector('.answers').offsetHeight") < 1.5 * 800


def test_paper_has_every_label_and_first_frame(many, tab):
    tab.goto((many / "studies/1.html").as_uri())
    assert tab.locator(".waterfall").count() == 1
    tab.pdf(format="A4")
    assert tab.locator(".waterfall").count() == 22
    assert tab.locator("details[open]").count() == 1  # as before
    tab.emulate_media(media="print")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    images = tab.locator("img")
    assert images.count() == 23
    assert images.evaluate_all("x => x.every(i => i.naturalWidth > 0 && i.checkVisibility())")
    assert tab.locator("video:visible").count() == 0
    assert "Not printed" in tab.inner_text("main")
    assert tab.locator(".answers.print-only .row:visible").count() == 23


def test_the_keyboard_reaches_labels_and_frames(many, tab):
    tab.goto((many / "studies/1.html").as_uri())

    def tab_to(selector):
        for _ in range(30):
            tab.keyboard.press("Tab")
            if tab.evaluate("s => document.activeElement.matches(s)", selector):
                return
        pytest.fail(f"the Tab key does not reach {selector}")

    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab_to("summary")
    tab.keyboard.press("Enter")
    assert tab.locator("details[open]").count() == 0
    tab.keyboard.press("Enter")
    tab_to(".timeline")
    for key in ("Home", "ArrowRight"):  # the first stops it
        tab.keyboard.press(key)
    assert tab.evaluate("document.activeElement.getAttribute('aria-valuenow')") == "2"


def test_a_name_of_a_patient_is_not_on_the_page(many, tab):
    digest = hashlib.sha256("2024-03-12 M\u00fcller".encode()).hexdigest()[:16]
    for path in sorted(many.rglob("*.html")):
        assert "ller" not in path.read_text().lower(), path
    tab.goto((many / "index.html").as_uri())
    assert digest in shown(tab) and "v0.avi and video 2 (PSAX.avi)" in tab.inner_text("#list")
    tab.goto((many / "studies/1.html").as_uri())
    names = tab.locator("#videos .player strong").all_inner_texts()
    assert names == ["A4C.avi", "video 2 (PSAX.avi)", "v0.avi"]
    table = pd.read_csv(many.with_name("p_names.csv"), keep_default_na=False)
    assert set(table["eid"]) == {"2024-03-12 M\u00fcller"}
    assert dict(zip(table["on_page"], table["file"], strict=True)) == {
        digest: "", "video 2 (PSAX.avi)": "MUELLER_ANNA/PSAX.avi", "file 1": "M\u00fcller.pdf",
    }  # fmt: skip


def test_bars_stay_on_the_axis_of_probability():
    rows = [(0, -36.2), (1, -35.3), (2, 21.7), (3, 19.3)]
    order = keep_inside(rows, 49.9)
    levels = 49.9 + np.cumsum([score for _, score in order])
    assert sorted(order) == rows and levels.min() >= 0 and order[0] == rows[0]


def test_names_of_videos_are_hidden_by_header_and_without_the_encoders_name():
    names = ["Zwei/A4C.avi", "Zwei/DOE_JANE/A4C.avi"]
    study = PageStudy("a", {}, names, encoders={"Eins": {}, "Zwei": {}})
    assert study.replaced == {names[1]: "video 2 (A4C.avi)"}
    study = PageStudy("a", {}, names, encoders={"Zwei": {"names_patient": "videos"}})
    assert study.replaced == dict(zip(names, ["video 1", "video 2"], strict=True))


def test_a_study_of_many_labels_is_small(many):
    sizes = [path.stat().st_size for path in many.rglob("*.html")]
    assert len(sizes) == 4 and sum(sizes) / 3 < 25_000  # 200 of them are below 5 MB


@pytest.mark.slow
def test_two_hundred_studies_of_many_labels(folder, tab, tmp_path):
    """Prints the time until both kinds of page are loaded from disk and their scripts have run."""
    names = ("v0.avi", "A4C.avi", "A2C.avi", "PLAX.avi", "PSAX.avi", "SUBC.avi")
    model, studies = many_labels(folder, 200, names)
    page = write_page(Page(tmp_path / "p", model, Settings(), studies, {})).parent
    files = [p for p in page.rglob("*") if p.is_file() and p.parent.name != "clips"]
    size = sum(p.stat().st_size for p in files) / 1e6
    seconds = []
    for path in (page / "index.html", page / "studies/1.html"):
        tab.goto(path.as_uri())
        timing = "performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"
        seconds.append(tab.evaluate(timing))
    print(f"{size:.2f} MB; list {seconds[0]:.2f} s, study {seconds[1]:.2f} s")
    assert len(files) == 203 and size < 5


def test_a_second_page_reuses_the_clips(folder, monkeypatch, cli):
    monkeypatch.chdir(folder.parents[2])
    before = {p: p.stat().st_mtime_ns for p in (folder / "clips").iterdir()}
    status, out, err = cli("explain", "--subset", "all", "--page", *METHOD)
    assert status == 0 and f"{folder.name}/index.html" in out, err
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "clips").iterdir()}
    assert len(before) == 18  # of each of six videos the clip, its first frame and facts


def test_predict_makes_a_page_of_videos(folder, tab, monkeypatch, cli, weights_drawn_once):
    """From a folder of DICOM; what is burned in outside the sector is not on the page."""
    monkeypatch.chdir(folder.parents[2])
    frames = phantom.phantom_cine(seed=5)
    for frame in frames:
        cv2.putText(frame, "DOE", (2, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255,) * 3, 1)
    header = write_cine(Path("visit/IM0001"), frames, fps=40)
    header.PatientID = "visit"
    header.save_as("visit/IM0001")
    options = ["--weights", "random", "--size", "56", "--n_clips", "2", "--device", "cpu"]
    line = ["predict", "--model_name", "t", "--videos", "visit", *options, "--page"]
    status, out, err = cli(*line, "--out", "p.csv")
    assert status == 0 and "p_page/index.html" in out, err
    (clip,) = Path("p_page/clips").glob("*.webm")
    shown = video.read_frames(clip)
    assert len(shown) == 16 and video.VideoFile(clip).rate == pytest.approx(40, rel=0.01)
    assert shown[:, :16, :40].max() < 30 and frames[:, :16, :40].max() > 200
    poster = cv2.imread(str(clip.with_suffix(".jpg")))
    assert np.corrcoef(poster.ravel(), shown[0].ravel())[0, 1] > 0.98
    assert np.corrcoef(shown[:, 30:].ravel(), frames[:, 30:].ravel())[0, 1] > 0.95
    tab.goto((Path("p_page") / "studies" / "1.html").resolve().as_uri())
    assert tab.locator(".waterfall").count() == 2 and "IM0001" in tab.inner_text("body")
    (answer,) = pd.read_csv("p.csv").to_dict("records")
    assert answer["eid"] == "visit" and "may name the patient" in answer["warning"]
    assert "1 of 1 studies seem" in out
    digest = hashlib.sha256(b"visit").hexdigest()[:16]
    assert tab.inner_text("h1") == f"Study {digest}"
    for file in Path("p_page").rglob("*.html"):
        assert str(Path.cwd()) not in file.read_text()


def test_the_frame_rate_is_that_of_the_file(tmp_path):
    frames = phantom.phantom_cine(size=(60, 80))
    header = write_cine(tmp_path / "a", frames, fps=12.5)
    phantom.write_video(tmp_path / "a.avi", frames, fps=12.5)
    for name in ("a", "a.avi"):
        assert video.VideoFile(tmp_path / name).rate == pytest.approx(12.5, rel=1e-3)
    for name in ("FrameTime", "CineRate"):
        delattr(header, name)
    header.save_as(tmp_path / "b")
    with video.VideoFile(tmp_path / "b") as opened:
        written = write_clip(opened, tmp_path / "b.webm", "none")
    assert (written.rate, written.rate_is_known, written.frames) == (30, False, 16)
