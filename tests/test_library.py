"""The functions of `import echofocus` give the results of the command line."""

import re
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT
from sklearn.metrics import roc_auc_score

import echofocus as ef
from echofocus_core.base.console import UserError
from echofocus_core.video.store import open_store


def test_the_examples_in_the_documentation_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.S):
        exec(code, names)
    for name in set(ef.__all__) - {"UserError"}:
        assert f"echofocus.{name}(" in (ROOT / "docs/python.md").read_text()
    model, clips, labels = (names[name] for name in ("model", "clips", "labels"))
    assert "\n" not in repr(model) and len(repr(model)) < 100

    split = pd.read_csv("trained_models/defect/split.csv", index_col="eid")
    test = split.index[split["fold"] == "test"]
    capfd.readouterr()
    answers = ef.predict("defect", clips, quiet=True).set_index("eid")["defect"]
    assert capfd.readouterr().out == ""
    truth = labels.set_index("eid")["defect"]
    metrics = ef.evaluate(Path("trained_models/defect"), clips, labels, n_boot=0)
    area = metrics.set_index("metric")["value"]["auroc"]
    assert area == pytest.approx(roc_auc_score(truth[test], answers[test]))
    theirs = names["theirs"].set_index("eid")["defect"]
    metrics = ef.evaluate(names["theirs"], labels=labels, task=["defect"], n_boot=0)
    area = metrics.set_index("metric")["value"]["auroc"]
    assert area == pytest.approx(roc_auc_score(truth[theirs.index], theirs))

    videos = names["videos"]
    eid, video = videos.index[5]
    alone = ef.embed(model, clips[eid][[int(video[-1])]])
    np.testing.assert_allclose(videos.loc[(eid, video)], alone.iloc[0], atol=1e-5)
    cells = pd.read_csv("trained_models/comparison/cells.csv")
    np.testing.assert_allclose(names["cells"]["value"], cells["value"], rtol=1e-5)
    rows = ef.explain(model, {"study 1": clips["study 1"]}, labels, explain_method="leave_one_out")
    assert (rows["y_true"] == truth["study 1"]).all() and len(rows) == 4
    numbers = dict(zip(rows["video"], rows["without"], strict=True))
    rest = ef.predict(model, clips["study 1"][1:])["defect"][0]
    assert numbers["video 0"] == pytest.approx(rest, rel=1e-4)


def test_the_same_numbers_as_the_command_line(trained, cli):
    assert cli("predict", "--out", "p.csv")[0] == 0 and cli("embed")[0] == 0
    model = ef.load("trained_models/defect")
    for source in ("emb", {p.stem: open_store(Path("emb")).read(p.stem).embeddings
                           for p in Path("emb").iterdir()}):  # fmt: skip
        table = ef.predict(model, source).set_index("eid").sort_index()
        expected = pd.read_csv("p.csv", dtype={"eid": str}).set_index("eid").sort_index()
        assert list(table) == list(expected) and table.attrs["left_out"] == {}
        np.testing.assert_allclose(table["finding"], expected["finding"], rtol=1e-5)
        vectors = ef.embed(model, source)
        with h5py.File("trained_models/defect/embeddings_site_defect.h5") as f:
            np.testing.assert_allclose(vectors.loc["1000"], f["1000"][:], atol=1e-5)


def test_mistakes_raise_one_line(trained, capfd):
    model, clips = ef.load("defect"), np.ones((1, 2, 768))
    shape = r"study x: expected clip .* shape \(videos, clips, 768\); the shape is "
    Path("bad").mkdir()
    Path("bad/7.hdf5").write_bytes(b"not HDF5")
    days = pd.read_csv("labels.csv", dtype=str)
    days = days.assign(day=[f"2020-01-{1 + i % 28:02}" for i in range(60)], grade="mild", blank="")
    for call, text in (
        (lambda: ef.predict(model, {"x": clips[0]}), shape + r"\(2, 768\)"),
        (lambda: ef.predict(model, {"x": clips * np.nan}), "study x: 1536 of its numbers are NaN"),
        (lambda: ef.predict(model, {"x": [clips[0], clips[0, :1]]}), "same number of clips"),
        (lambda: ef.predict(model, {1: clips, "1": clips}), "two study ids are 1"),
        (lambda: ef.predict(model, {"x": {0: clips[0], "0": clips[0]}}), "two videos of study x"),
        (lambda: ef.predict(model, {}), "the dict has no study"),
        (lambda: ef.predict(model, {"": clips}), "study '': an id has 1 to 200 bytes"),
        (lambda: ef.predict(model, {"x" * 300: clips}), "an id has 1 to 200 bytes"),
        (lambda: ef.predict(model, {"x\0": clips}), "can be printed"),
        (lambda: ef.train("emb", "labels.csv", None), "task: a list of labels"),
        (lambda: ef.predict(model, "bad"), "no study could be read: 7: .*7.hdf5"),
        (lambda: ef.evaluate(model, "emb", "labels.csv", compare=[pd.DataFrame()]), "to a CSV"),
        (lambda: ef.evaluate(model, "emb", days, by=["finding", "day"]), "--by: day holds dates"),
        (lambda: ef.train("emb", days, ["grade"]), '"classes": {"<label>"'),
        (lambda: ef.train("emb", days, ["blank"]), "^blank: the label table has no usable value"),
        (lambda: ef.predict(model, {"x": clips[..., :512]}), shape + r"\(1, 2, 512\)"),
        (lambda: ef.predict(model, {"a/b": clips}), "study 'a/b'"),
        (lambda: ef.predict(model, "nowhere"), "nowhere is not a folder"),
        (lambda: ef.predict(model, clips, sample_limits=2), "did you mean sample_limit"),
        (lambda: ef.predict(model, clips, page=True), "predict.. has no option page"),
        (lambda: ef.predict(clips, clips), "expected a model"),
        (lambda: ef.predict("defects", clips), "did you mean defect?"),
        (
            lambda: ef.explain(model, clips, explain_tasks=["findings"]),
            "no label findings in defect; did you mean finding",
        ),
        (lambda: ef.evaluate(model, "emb", clips), "expected a DataFrame or a path"),
        (lambda: ef.train("emb", "labels.csv", {"task_labels": ["finding"], "typ": ""}), "type?"),
        (
            lambda: ef.train("emb", pd.DataFrame({"eid": ["1"]}), ["finding"]),
            "^labels.csv has no column 'pid'",
        ),
        (lambda: ef.compare("emb"), "encoders: name them"),
    ):
        with pytest.raises(UserError, match=text) as error:
            call()
        assert len(str(error.value).splitlines()) == 1
    shutil.copy("emb/1000.hdf5", "bad")
    capfd.readouterr()
    assert ef.predict(model, "bad", quiet=True)["eid"].tolist() == ["1000"]
    assert "WARNING: 1 study left out:\n7: " in capfd.readouterr().out
    with pytest.raises(UserError, match="no column 'pid'"):
        ef.evaluate(model, "emb", days.drop(columns="pid"), quiet=True)
    assert capfd.readouterr().out == ""
    twice = pd.concat([days, days[:1]]).set_index("eid", drop=False)
    videos = {0: torch.ones(2, 768).bfloat16(), 1: torch.ones(2, 768).bfloat16()}
    ef.predict(model, {1000: videos})
    ef.evaluate(model, "emb", twice, n_boot=0)
    assert "WARNING: labels.csv: 1 row is repeated" in capfd.readouterr().out
    Path("config.json").unlink()
    with pytest.raises(UserError, match=r'of this name: task=\["finding"\]'):
        ef.train("emb", "labels.csv", "finding")
    with pytest.raises(UserError, match="task: name the labels"):
        ef.train("emb", "labels.csv")
    with pytest.raises(UserError, match="source: give"):
        ef.predict(model)


def test_calls_change_no_global_state(trained, cli):
    """torch's generator, its flags and standard output stay the same."""
    before = torch.get_rng_state(), torch.backends.cudnn.allow_tf32, sys.stdout
    torch.backends.cudnn.allow_tf32 = True
    try:
        assert cli("train", "--task", "defect", "--epoch_lim", "2")[0] == 0
        model = ef.load("defect")
        ef.predict(model, "emb")
        ef.explain(model, np.ones((2, 2, 768), np.float32))
        assert torch.equal(torch.get_rng_state(), before[0]) and sys.stdout is before[2]
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before[1]
