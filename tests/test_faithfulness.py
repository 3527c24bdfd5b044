"""Curves of videos taken away, and importance by view, on a cohort where one video decides."""

import json
from pathlib import Path

import pandas as pd
import pytest
from helpers import normal, write_embeddings

PATTERN = 2 * normal(77, 768)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """60 studies of five videos; the label is whether one of them, at any place, has a pattern."""
    monkeypatch.chdir(tmp_path)
    rows, views = [], []
    for i in range(60):
        bag, place = normal(i, 5, 4, 768), i % 5
        bag[place] += PATTERN if i % 2 else -PATTERN
        write_embeddings(Path("emb"), f"{i:03}", bag)
        rows.append({"pid": f"P{i // 2}", "eid": f"{i:03}", "finding": i % 2})
        for k in range(5):
            views.append((f"{i:03}", f"v{k:02}.avi", "A4C" if k == place else f"view {k}"))
    pd.DataFrame(rows).to_csv("labels.csv", index=False)
    pd.DataFrame(views, columns=["eid", "video", "view"]).to_csv("views.csv", index=False)
    task = {"task_labels": ["finding"], "label_path": "labels.csv", "type": "binary"}
    dataset = {"embedding_path": "emb", "views": "views.csv"}
    config = {"task": {"t": task}, "dataset": {"d": dataset}}
    Path("config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_planted_video_is_found_and_decides(planted, cli):
    line = ["train", "--epoch_lim", "5", "--batch_number", "8", "--learning_rate", "1e-3"]
    assert cli(*line)[0] == 0
    status, _, err = cli("explain", "--curves")
    assert status == 0, err
    beside = Path("trained_models/t/explanation_test_d")
    videos = pd.read_csv(f"{beside}.csv", dtype={"eid": str})
    towards = videos["score"] * (2 * videos["y_true"] - 1)
    top = videos.loc[towards.groupby(videos["eid"]).idxmax()]
    planted_place = [f"v{int(eid) % 5:02}.avi" for eid in top["eid"]]
    assert (top["video"] == planted_place).mean() >= 0.95

    areas = pd.read_csv(f"{beside}.curve_areas.csv").set_index("kind")
    assert areas.loc["deletion", "against_random_high"] < -0.1
    assert areas.loc["insertion", "against_random_low"] > 0.1
    curves = pd.read_csv(f"{beside}.curves.csv").set_index(["kind", "order", "share"])["quality"]
    for order in ("score", "random"):  # with all videos both say the same
        whole = curves["deletion", order, 0.0]
        assert whole == pytest.approx(curves["insertion", order, 1.0], rel=1e-4) and whole > 0.8
    assert curves["deletion", "score", 0.3] < 0.6 < curves["insertion", "score", 0.0]

    views = pd.read_csv(f"{beside}.views.csv").set_index("view")
    assert views["per_video"].idxmax() == "A4C" and views.loc["A4C", "per_video_low"] > 1.5
    assert (views["per_video_low"] <= views["per_video"]).all()
    size = videos["score"].abs()
    share = size / size.groupby(videos["eid"]).transform("sum")
    planted = videos["video"] == videos["eid"].map(lambda eid: f"v{int(eid) % 5:02}.avi")
    assert views.loc["A4C", "per_video"] == pytest.approx(5 * share[planted].mean(), rel=1e-3)
    assert Path(f"{beside}.curves.png").is_file() and Path(f"{beside}.views.png").is_file()

    odd = {"film": "no column video", "video": "no video of these studies"}
    for column, message in odd.items():
        Path("views.csv").write_text(f"eid,{column},view\n1000,other.avi,A4C\n")
        status, out, err = cli("explain")
        assert status == 1 and message in err and "wrote" not in out
