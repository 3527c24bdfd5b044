"""What torchrun and SLURM say in the environment: used where it is sound, else one clear line."""

import pytest

from echofocus_core.base.console import UserError
from echofocus_core.base.world import from_environment, place
from echofocus_core.video.studies import shard_from

ODD = ["", "x", "-1", "1.0", "1e3", " 1", "\u0663", "9" * 40, "1\x1b[2J"]


@pytest.mark.parametrize("value", ODD)
def test_odd_values_are_named(value):
    for read in (
        lambda: from_environment("LOCAL_RANK", 0, environment={"LOCAL_RANK": value}),
        lambda: place("RANK", "WORLD_SIZE", {"RANK": "0", "WORLD_SIZE": value}),
        lambda: place("RANK", "WORLD_SIZE", {"RANK": value, "WORLD_SIZE": "2"}),
        lambda: shard_from("auto", {"SLURM_ARRAY_TASK_ID": value}),
        lambda: shard_from("auto", {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": value}),
        lambda: shard_from("auto", {"SLURM_PROCID": value, "SLURM_NTASKS": "2"}),
    ):
        with pytest.raises(UserError, match=r"(RANK|SIZE|ID|MIN) in the environment is") as refusal:
            read()
        assert str(refusal.value).isprintable() and "unset" in str(refusal.value)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "2"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "3"},
    ],
)
def test_what_contradicts_itself(environment):
    with pytest.raises(UserError, match=r"RANK|WORLD_SIZE|SLURM"):
        shard_from("auto", environment)
        place("RANK", "WORLD_SIZE", environment)


@pytest.mark.parametrize(
    ("command", "name"), [("train", "WORLD_SIZE"), ("embed", "WORLD_SIZE"), ("train", "RANK")]
)
def test_by_the_command_line(tmp_path, monkeypatch, cli, command, name):
    """`train` and the rest end in one line before anything is read."""
    monkeypatch.chdir(tmp_path)
    for variable in ("WORLD_SIZE", "RANK"):
        monkeypatch.setenv(variable, "many" if variable == name else "1")
    status, _, err = cli(command)
    assert status == 1 and err.count("\n") == 1, err
    assert f"{name} in the environment is 'many'" in err


@pytest.mark.parametrize(
    "variables, text",
    [
        ({}, "MASTER_ADDR"),
        ({"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "29500"}, "do not find each other"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "abc"}, "MASTER_PORT in the environment"),
    ],
)
def test_processes_that_cannot_meet(tmp_path, monkeypatch, cli, variables, text):
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"WORLD_SIZE": "2", "RANK": "0"} | variables).items():
        monkeypatch.setenv(name, value)
    status, _, err = cli("train")
    assert status == 1 and err.count("\n") == 1 and text in err, err
