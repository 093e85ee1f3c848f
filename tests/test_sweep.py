"""Suites: the scripts take their command lines, and what is missing of one is completed."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import tyro
from conftest import ROOT, SMALL, environment, load
from runs import result, steps_saved, wait_for

from benchmarks import sweep

SUITES = sorted((ROOT / "benchmarks/suites").glob("*.toml"))


@pytest.fixture(scope="module")
def scripts():
    return {path.name: load(path) for path in ROOT.glob("ppo_*.py")}


@pytest.fixture
def run_sweep(tmp_path, monkeypatch, capsys):
    """Returns a function that runs a sweep in a folder: its exit code, and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def run(*args, **settings):
        code = 0
        try:
            sweep.main(*args, **settings)
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out

    return run


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_suites_command_lines_are_its_scripts(path, scripts):
    suite = sweep.read_suite(path)
    seen = set()
    for run in suite.runs:
        script = scripts[run.script]
        job = sweep.make_job(run, sweep.Path("runs", suite.name))
        if run.name in seen:  # another environment
            continue
        seen.add(run.name)
        args = tyro.cli(script.Args, args=job.training[1:])
        assert args.env_id == run.env_id and args.num_seeds == run.seeds
        if job.evaluation:
            plays = tyro.cli(script.Args, args=job.evaluation[1:], default=args)
            assert plays.mode == "eval" and plays.folder == args.folder


def test_what_is_missing_is_completed_and_what_failed_is_listed(tmp_path, run_sweep):
    flags = " ".join(SMALL["ppo_continuous"])
    suite = tmp_path / "two.toml"
    text = f'script = "{ROOT}/ppo_continuous.py"\nflags = "{flags}"\nseeds = 2\neval_episodes = 3\n'
    suite.write_text(f'{text}[[runs]]\nenv_id = ["Pendulum-v1", "Pendulun-v1"]')
    code, said = run_sweep(suite)
    assert code == 1
    assert "failed: ppo_continuous.py: --env-id Pendulun-v1 is unknown" in said
    folder = tmp_path / "runs/two/Pendulum-v1/ppo_continuous"
    assert [row["episodes"] for row in result(folder)["eval_return"]] == [3, 3]

    log = folder / "sweep.log"
    before = log.stat().st_mtime_ns
    command = log.read_text().splitlines()[0].removeprefix("$ ")
    suite.write_text(f'{text}env_id = "Pendulum-v1"')
    code, said = run_sweep(suite)
    assert code == 0 and said.startswith("Pendulum-v1/ppo_continuous: done, 128, -")
    assert log.stat().st_mtime_ns == before
    assert run_sweep(suite, dry_run=True) == (0, "")
    suite.write_text(f'{text}env_id = "Pendulum-v1"\ntotal_timesteps = 256')
    dry = run_sweep(suite, dry_run=True)[1].splitlines()
    assert dry[0].replace("--total-timesteps 256 ", "") == command != dry[0]
    assert dry[1].endswith("--eval-episodes 3")


def test_a_stopped_sweep_saves_and_goes_on(tmp_path, run_sweep):
    flags = " ".join(SMALL["ppo_continuous"])
    suite = tmp_path / "long.toml"
    text = f'script = "{ROOT}/ppo_continuous.py"\nenv_id = "Pendulum-v1"\nflags = "{flags}"\n'
    suite.write_text(f"{text}total_timesteps = 100_000_000\neval_episodes = 0")
    line = [sys.executable, "-m", "benchmarks.sweep", str(suite)]
    env = environment(PYTHONPATH=str(ROOT))
    process = subprocess.Popen(line, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "runs/long/Pendulum-v1/ppo_continuous"
    wait_for(folder / "result.json", process)
    process.terminate()
    assert process.wait() == 130
    steps = result(folder)["timesteps"]
    assert steps == 64 * steps_saved(folder)[-1] and not result(folder)["finished"]
    suite.write_text(f"{text}total_timesteps = {steps + 64}\neval_episodes = 0")
    assert run_sweep(suite)[0] == 0
    assert result(folder)["timesteps"] == steps + 64


def test_workers_share_devices_and_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {2, 3, 4, 5, 6})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [share.cores for share in sweep.make_shares(0, 2)] == [[2, 3], [4, 5]]
    assert [share.cores for share in sweep.make_shares(0, 9)] == [[2], [3], [4], [5], [6]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert [share.env for share in sweep.make_shares(0, 9)] == [
        {"CUDA_VISIBLE_DEVICES": "1"},
        {"CUDA_VISIBLE_DEVICES": "3"},
    ]
    several = sweep.make_shares(2, 9)
    assert [share.env["CUDA_VISIBLE_DEVICES"] for share in several] == ["1", "3", "1", "3"]
    assert [share.cores for share in several] == [[2], [3], [4], [5]]


def test_what_optuna_draws_is_a_grid_of_points():
    drawn = [{"learning_rate": 1e-4, "gamma": 0.9}, {"learning_rate": 3e-4, "gamma": 0.99}]
    points = sweep.points_of([SimpleNamespace(params=params) for params in drawn])
    run = sweep.Run(script="ppo_continuous.py", env_id="Pendulum-v1", grid=points)
    job = sweep.make_job(run, sweep.Path("runs/tune"))
    assert job.training[-2:] == ["--grid", "gamma:learning_rate=0.9:0.0001,0.99:0.0003"]
