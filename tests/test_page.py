"""The page in a real browser: nothing asked of the network, names as text, videos that play."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from helpers import normal, write_cine

import echofocus as ef
from echofocus_core.base.console import run_main
from echofocus_core.base.options import Settings
from echofocus_core.report.page import Page, PageStudy, write_page
from echofocus_core.study.explanations import explain
from echofocus_core.video import decode as video
from echofocus_core.video import phantom
from echofocus_core.video.playback import write_clip
from echofocus_core.video.store import FileRecord, StudyClips, write_study
from echofocus_core.video.studies import Study

pytestmark = pytest.mark.xdist_group("page")  # one process: one page and one browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), "")
HOSTILE = "<img src=x onerror=alert(1)>\"'=1+1"
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


@pytest.fixture(scope="module")
def chromium():
    if not CHROMIUM:
        pytest.skip("needs chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


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
    assert sorted(shown(tab)) == sorted(STUDIES) and tab.locator("img").count() == 0
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
    best = [tab.locator(f"#label-{k} .players figure").first.get_attribute("data-clip")
            for k in range(2)]  # fmt: skip
    assert best[0] != best[1]
    tab.goto((folder / "index.html").as_uri())
    tab.fill("#search", "s00")
    for k in (0, 1, 0):
        tab.select_option("#label", str(k))
        video = tab.locator("#list tbody tr:visible video")
        assert best[k] == "../" + video.get_attribute("data-src")
        tab.wait_for_function("v => v.src.endsWith(v.dataset.src)", arg=video.element_handle())


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
    assert HOSTILE_LABEL in tab.inner_text("table")
    assert "still <b>image</b>" in tab.inner_text("body")
    assert "not a medical device" in tab.inner_text(".research")
    description = tab.get_attribute(".waterfall", "aria-label")
    assert all(text in description for text in ("baseline", "v0.avi", "answer"))
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
        assert f"frame {expected} of 16" in player.inner_text()
    line.press("ArrowLeft")
    assert line.get_attribute("aria-valuenow") == "2"
    for _ in range(2):
        player.locator(".back").click()
    assert "frame 16 of 16" in player.inner_text()  # a loop


def test_the_clip_that_counted_most_is_marked(folder, tab):
    import h5py

    open_study(folder, tab, "S00")
    with h5py.File(folder.parent / "explanation_all_d.clips.h5") as f:
        labels, scores = f["S00/labels"].asstr()[:].tolist(), f["S00/scores"][:]
    section = tab.locator("section.label").first
    k = labels.index(section.locator("h2").inner_text().rsplit(":", 1)[0])
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
    player = tab.locator(".all-videos .player").nth(1)
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
        tab.wait_for_timeout(400)
        data = np.frombuffer(player.locator("video").screenshot(), np.uint8)
        image = cv2.resize(cv2.imdecode(data, cv2.IMREAD_COLOR), (160, 120))[10:110, 10:150]
        alike.append([
            np.corrcoef(image.ravel(), f[10:110, 10:150].ravel())[0, 1] for f in frames
        ])  # fmt: skip
    assert np.argmax(alike, axis=1).tolist() == [0, 5, 11] and np.max(alike, axis=1).min() > 0.93


def test_a_source_that_is_gone_has_a_stand_in(folder, tab):
    open_study(folder, tab, "S20")
    assert "the source video is not available" in tab.inner_text(".standin >> nth=0")
    assert tab.locator("video").count() == 0


def test_two_hundred_studies_load_what_is_looked_at(folder, tab, tmp_path):
    source = Study("x", folder.parents[2] / "videos" / "S00", ["v0.avi"])
    row = {"n_clips": 3, "warning": "", "novelty": 0.5, "other": 0.7, HOSTILE_LABEL: 0.1}
    studies = [
        PageStudy(f"study {i}", row | {"eid": f"study {i}"}, ["v0.avi"], source=source)
        for i in range(200)
    ]
    page = Page(tmp_path / "p", ef.load(folder.parent), Settings(), studies, {"y": "<i>no</i>"})
    tab.goto(write_page(page).as_uri())
    assert tab.locator("#list tbody tr").count() == 200
    loaded = tab.evaluate("[...document.querySelectorAll('#list video')].filter(v => v.src).length")
    assert 0 < loaded < 60 and len(list((tmp_path / "p/clips").glob("*.webm"))) == 1
    tab.fill("#search", "199")
    assert shown(tab) == ["study 199"]
    assert "<i>no</i>" in tab.inner_text("body")


def test_values_that_no_study_has_get_no_column(folder, tab, tmp_path):
    """An empty column of novelty would look like nothing unusual."""
    row = {"eid": "a", "n_clips": 1, "warning": "", "other": 0.7, HOSTILE_LABEL: 0.1}
    heads = []
    for more in ({}, {"novelty": 0.5, "other_low": 0.6, "other_high": 0.8}):
        page = Page(tmp_path / "p", ef.load(folder.parent), Settings(), [
            PageStudy("a", row | more, ["v0.avi"])], {})  # fmt: skip
        tab.goto(write_page(page).as_uri())
        heads.append(tab.locator("#list thead th").all_inner_texts())
        assert tab.locator("#novelty").is_disabled() == (not more)
        tab.select_option("#label", "1")
        assert shown(tab) == ["a"] and "70.0 %" in tab.inner_text("#list")
        tab.goto((tmp_path / "p/studies/1.html").as_uri())
        assert "1 video, 1 clip " in tab.inner_text("main")
        assert ("no record of its training data" in tab.inner_text("main")) == (not more)
    assert heads[0] == ["Top video", "Study", "Answer", "Videos", "Warnings"]
    assert {"Answer (90\u00a0% range)", "Range width", "Novelty"} <= set(heads[1])


def test_the_only_video_cannot_be_left_out(folder, tab, tmp_path):
    """It has no score by leave_one_out, and so no waterfall."""
    explanation = {"columns": [0, 1], "scores": np.full((2, 1, 3), np.nan), "names": ["v0.avi"]}
    row = {"eid": "a", "n_clips": 3, "warning": "", "other": 0.7, HOSTILE_LABEL: 0.1}
    studies = [PageStudy("a", row, ["v0.avi"], explanation)]
    settings = Settings(explain_method="leave_one_out")
    write_page(Page(tmp_path / "p", ef.load(folder.parent), settings, studies, {}))
    tab.goto((tmp_path / "p/studies/1.html").as_uri())
    assert tab.locator("svg.waterfall").count() == 0 and "nan" not in tab.inner_text("main")


def test_shapley_values_start_from_the_answer_for_no_videos(folder, tab, tmp_path):
    model, settings = ef.load(folder.parent), Settings(explain_method="shapley")
    bag = StudyClips(np.random.default_rng(0).normal(size=(2, 3, 768)), ["v0.avi", "v1.avi"], {})
    explanation = explain(model, "a", bag, [0, 1], settings)
    row = {"eid": "a", "n_clips": 6, "warning": "", "other": 0.7, HOSTILE_LABEL: 0.1}
    studies = [PageStudy("a", row, bag.videos, explanation)]
    write_page(Page(tmp_path / "p", model, settings, studies, {}))
    tab.goto((tmp_path / "p/studies/1.html").as_uri())
    assert tab.locator("svg.waterfall").count() == 2
    empty = model.readable(model.mean_answer[None])[0, 0]
    assert f"{100 * empty:.1f}" in tab.locator("svg.waterfall").first.text_content()
    text = tab.locator("body").text_content()
    assert "Shapley value" in text and "mean answer in the training fold" in text
    assert "baseline zero" not in text


def test_a_second_page_reuses_the_clips(folder, monkeypatch, cli):
    monkeypatch.chdir(folder.parents[2])
    before = {p: p.stat().st_mtime_ns for p in (folder / "clips").iterdir()}
    status, out, err = cli("explain", "--subset", "all", "--page", *METHOD)
    assert status == 0 and f"{folder.name}/index.html" in out, err
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "clips").iterdir()}
    assert len(before) == 12  # of each of six videos the clip and what is in it


def test_predict_makes_a_page_of_videos(folder, tab, monkeypatch, cli, weights_drawn_once):
    """From a folder of DICOM; what is burned in outside the sector is not on the page."""
    monkeypatch.chdir(folder.parents[2])
    frames = phantom.phantom_cine(seed=5)
    for frame in frames:
        cv2.putText(frame, "DOE", (2, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255,) * 3, 1)
    write_cine(Path("visit/IM0001"), frames, fps=40)
    options = ["--weights", "random", "--size", "56", "--n_clips", "2", "--device", "cpu"]
    line = ["predict", "--model_name", "t", "--videos", "visit", *options, "--page"]
    status, out, err = cli(*line, "--out", "p.csv")
    assert status == 0 and "p_page/index.html" in out, err
    (clip,) = Path("p_page/clips").glob("*.webm")
    shown = video.read_frames(clip)
    assert len(shown) == 16 and video.VideoFile(clip).rate == pytest.approx(40, rel=0.01)
    assert shown[:, :16, :40].max() < 30 and frames[:, :16, :40].max() > 200
    assert np.corrcoef(shown[:, 30:].ravel(), frames[:, 30:].ravel())[0, 1] > 0.95
    tab.goto((Path("p_page") / "studies" / "1.html").resolve().as_uri())
    assert tab.locator(".waterfall").count() == 2 and "IM0001" in tab.inner_text("body")
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
