"""Killed runs and runs of several processes give the results of an uninterrupted run."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import echofocus as ef
from echofocus_core.base.options import Settings
from echofocus_core.study.loading import read_checkpoint
from echofocus_core.study.loop import LoopContext, train_steps
from echofocus_core.study.network import StudyModel
from echofocus_core.study.outputs import Outputs
from echofocus_core.video.store import open_store

pytestmark = pytest.mark.xdist_group("training")  # one process: one run to compare with
# Batches of few clips, so that a step has several and the last one fewer than there are processes.
LINE = ["train", "--task", "defect", "--epoch_lim", "3", "--batch_tokens", "20"]
LINE += ["--checkpoint_minutes", "0"]


@pytest.fixture(scope="module")
def whole(one_cohort, tmp_path_factory):
    """The checkpoint of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(one_cohort, folder, dirs_exist_ok=True)
    with contextlib.chdir(folder):
        ef.main([*LINE, "--run_id", "whole"])
        return read_checkpoint(last_of("defect_whole"))


OUT = Path("out.txt")


def command(*line):
    """A program: a command line, what it prints in OUT."""
    for stream in (1, 2):
        os.dup2(os.open(OUT, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    sys.argv = ["echofocus.py", *line]
    ef.program()


def torchrun(*line):
    """Two processes of a command line, as torchrun starts them; they may be started once more."""
    config = LaunchConfig(
        1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", max_restarts=1,
        start_method="fork", logs_specs=DefaultLogsSpecs(),
    )  # fmt: skip
    elastic_launch(config, command)(*line)


@pytest.fixture
def start(cohort, monkeypatch):
    """Start a program as a fork of a process with all imports."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["test_training", "torch._dynamo", "echofocus_core.base.figures"]
    )
    started = []

    def run(program, *line):
        started.append(context.Process(target=program, args=line))
        started[-1].start()
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.join()


def wait_for_new(path, process, before, seconds=120):
    """Wait for a file newer than `before`; False if the process ended first."""
    end = time.time() + seconds
    while time.time() < end:
        if path.exists() and path.stat().st_mtime_ns != before:
            return True
        if not process.is_alive():
            return False
        time.sleep(0.002)
    raise AssertionError(f"no new {path} in {seconds} s")


def last_of(run):
    return Path("trained_models") / run / "last_checkpoint.pt"


def test_kill_9_at_random_moments(whole, start):
    """Bit for bit the weights, optimiser and history of the run that was never stopped."""
    path, draw = last_of("defect_killed"), random.Random(0)
    for _ in range(3):
        process = start(command, *LINE, "--run_id", "killed")
        before = path.stat().st_mtime_ns if path.exists() else 0
        if wait_for_new(path, process, before):
            time.sleep(draw.uniform(0, 0.3))  # within a step, a write, the validation
        process.kill()
        process.join()
        assert torch.load(path, weights_only=True)["progress"] is not None
    OUT.unlink()
    process = start(command, *LINE, "--run_id", "killed")
    process.join(120)
    out = OUT.read_text()
    assert process.exitcode == 0 and "resuming" in out, out
    resumed = read_checkpoint(path)
    for part in ("model_state_dict", "optimizer_state_dict"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
    assert whole["scheduler_state_dict"] == resumed["scheduler_state_dict"]
    assert [r[:4] for r in whole["perf_log"]] == [r[:4] for r in resumed["perf_log"]]
    left = {p.name for p in path.parent.iterdir() if not p.name.endswith((".pdf", ".png"))}
    names = {"best_checkpoint.pt", "last_checkpoint.pt", "split.csv", "train_losses.csv"}
    assert left == names | {"run.json", "train_args.csv"}  # nothing half-written


def workers_of(process):
    """Process ids of torchrun's workers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for workers in /proc")
def test_several_processes_and_a_dead_worker(whole, start):
    """torchrun restarts a killed process; the losses equal those of one process."""
    process = start(torchrun, *LINE, "--run_id", "two", "--device", "cpu")
    path = last_of("defect_two")
    assert wait_for_new(path, process, 0), OUT.read_text()
    assert wait_for_new(path, process, path.stat().st_mtime_ns)
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    process.join(240)
    out = OUT.read_text()
    assert process.exitcode == 0, out
    assert "2 processes share each optimiser step" in out and "resuming" in out
    resumed = read_checkpoint(path)
    history = [np.array([row[:4] for row in x["perf_log"]]) for x in (whole, resumed)]
    np.testing.assert_allclose(*history, rtol=1e-4)
    assert len(pd.read_csv(path.with_name("train_losses.csv"))) == 3
    assert out.count("best validation loss") == 1  # one process speaks


def test_batches_side_by_side_train_as_one_after_the_other(cohort):
    """Two batches at a time: the same losses and weights as one, and each time the same bits."""
    store, threads = open_store(cohort / "emb"), torch.get_num_threads()
    eids = list(store.files)[:24]
    targets = {eid: np.array([float(i % 2)]) for i, eid in enumerate(eids)}
    settings = Settings(batch_number=12, batch_tokens=16, learning_rate=1e-3)

    def trained(n):
        torch.set_num_threads(n)
        try:
            with torch.random.fork_rng([]):
                torch.manual_seed(0)
                net = StudyModel(1)
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
            context = LoopContext(net, store, settings, targets, Outputs.of("x", "binary"))
            before = torch.get_rng_state()
            losses = [loss for _, loss in train_steps(context, eids, optimizer)]
            assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == n
            return losses, torch.cat([p.detach().flatten() for p in net.parameters()])
        finally:
            torch.set_num_threads(threads)

    (one, weights), (two, side), (_, again) = trained(1), trained(2), trained(2)
    assert len(one) == 2 and two == pytest.approx(one, rel=1e-6)
    assert torch.equal(side, again)
    torch.testing.assert_close(side, weights, rtol=1e-4, atol=1e-5)
