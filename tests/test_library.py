"""The functions of `import echofocus` give the results of the command line."""

import re
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT

import echofocus as ef
from echofocus_core.base.console import UserError
from echofocus_core.video.store import open_store


def test_the_snippet_of_the_readme_runs(trained, capfd):
    text = (ROOT / "README.md").read_text()
    code = re.search(r"<!-- run:library -->\n```python\n(.*?)```", text, re.S)[1]
    exec(code, {})
    out = capfd.readouterr().out
    assert "visit 1" in out and "finding_decision" in out and "video 4" in out


def test_the_same_numbers_as_the_command_line(trained, cli):
    assert cli("predict", "--out", "p.csv")[0] == 0 and cli("embed")[0] == 0
    model = ef.load("trained_models/defect")
    for source in ("emb", {p.stem: open_store(Path("emb")).read(p.stem).embeddings
                           for p in Path("emb").iterdir()}):  # fmt: skip
        table = ef.predict(model, source).set_index("eid").sort_index()
        expected = pd.read_csv("p.csv", dtype={"eid": str}).set_index("eid").sort_index()
        assert list(table) == list(expected) and table.attrs["left_out"] == {}
        np.testing.assert_allclose(table["finding"], expected["finding"], rtol=1e-5)
        vectors = ef.study_embeddings(model, source)
        with h5py.File("trained_models/defect/embeddings_site_defect.h5") as f:
            np.testing.assert_allclose(vectors.loc["1000"], f["1000"][:], atol=1e-5)


def test_one_study_as_an_array(trained):
    model, clips = ef.load("defect"), open_store(Path("emb")).read("1000").embeddings
    row, rows = (ef.predict(model, x) for x in (clips, {"study": clips}))
    pd.testing.assert_frame_equal(row, rows)
    assert row["eid"].tolist() == ["study"]
    assert ef.study_embeddings(model, clips).shape == (1, 768)


def test_arrays_and_labels_that_do_not_fit(trained):
    model = ef.load("defect")
    for clips, text in (
        (
            np.zeros((3, 768)),
            r"shape \(videos, clips, 768\); the shape is \(3, 768\)",
        ),
        (np.full((1, 2, 768), np.nan), "study x: expected finite"),
        (np.ones((1, 2, 512)), r"768\); the shape is \(1, 2, 512\)"),
    ):
        with pytest.raises(UserError, match=text):
            ef.predict(model, {"x": clips})
    with pytest.raises(UserError, match="no label findings in defect; did you mean finding"):
        ef.attribute(model, np.ones((1, 2, 768)), ["findings"])


def test_calls_change_no_global_state(trained, cli):
    """torch's generator, its flags and standard output stay the same."""
    before = torch.get_rng_state(), torch.backends.cudnn.allow_tf32, sys.stdout
    torch.backends.cudnn.allow_tf32 = True
    try:
        assert cli("train", "--task", "defect", "--epoch_lim", "2")[0] == 0
        model = ef.load("defect")
        ef.predict(model, "emb")
        ef.attribute(model, np.ones((2, 2, 768), np.float32))
        assert torch.equal(torch.get_rng_state(), before[0]) and sys.stdout is before[2]
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before[1]
