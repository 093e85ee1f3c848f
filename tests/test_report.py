"""benchmarks/tables.py and benchmarks/report.py: what they make of run folders and of results."""

import html
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import time

import imageio.v3 as iio
import numpy as np
import pytest
import tyro
from conftest import ROOT, SMALL, command, environment
from processes import execute
from runs import result, scalars
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from benchmarks import tables

RETURN = "charts/episodic_return_100"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_page = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("plotly", "rliable")),
    reason="benchmarks/requirements.txt is not installed",
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the folder of a run of two seeds."""
    folder = tmp_path_factory.mktemp("runs") / "pendulum"
    flags = "--env-id gymnax/Pendulum-v1 --num-seeds 2 --num-envs 8 --num-steps 64 --log-interval 2"
    flags = [*SMALL["ppo_continuous"], *flags.split(), "--total-timesteps", "8192"]
    line = command("ppo_continuous", *flags, "--run-dir", folder)
    execute(line, folder.parent, environment()).check_returncode()
    return folder


def write(folder, returns, start=0):
    """Writes event files in which every 100 steps from `start` on have a return."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = EventFileWriter(str(folder))
    log = SessionLog(status=SessionLog.START)
    writer.add_event(Event(wall_time=time.time(), step=start + 1, session_log=log))
    for i, value in enumerate(returns):
        numbers = {RETURN: value, tables.LENGTH: 10 + value, tables.SPEED: 50.0}
        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in numbers.items()])
        writer.add_event(Event(wall_time=time.time(), step=start + 100 * (i + 1), summary=summary))
    writer.close()


def run_folder(folder, members=None, seeds=(1,), **more):
    """Returns a run folder as a script leaves it, but for its event files."""
    folder.mkdir(parents=True, exist_ok=True)
    args = {"env_id": "Task-v0", "exp_name": "ppo", "seed": seeds[0], "run_dir": str(folder)}
    args |= {"num_envs": 2, "num_steps": 50, "gamma": 0.9, "kl_rule": [2.0, 1.5, 0.667]}
    content = {
        "script": "ppo_continuous.py",
        "env_id": "Task-v0",
        "args": args | more,
        "seeds": list(seeds),
        "finished": True,
        "timesteps": 400,
        "episodic_return": [float(seed) for seed in seeds],
        "eval_return": None,
        "sps": 50.0,
        "wall_time": 9.0,
        "compile_time": 1.0,
        "versions": {"jax": "1"},
        "device": "cpu",
    }
    if members:
        content["members"] = members
    (folder / "result.json").write_text(json.dumps(content))
    shutil.copy(ROOT / "ppo_continuous.py", folder)
    return folder


def test_curves_are_what_the_event_files_say(trained):
    (entry,) = tables.collect([trained])
    found = [scalars(trained / f"seed{seed}")[RETURN] for seed in (1, 2)]
    assert entry["steps"] == [step for step, _ in found[0]]
    for curve, events in zip(entry["returns"], found, strict=True):
        np.testing.assert_allclose(curve, [value for _, value in events], rtol=1e-4)
    assert entry["seeds"] == [1, 2]
    assert entry["episodic_return"] == result(trained)["episodic_return"]
    assert np.all(np.diff(entry["seconds"]) > 0)


def test_a_command_makes_the_run_again(trained, ppo):
    (entry,) = tables.collect([trained])
    words = shlex.split(entry["command"])
    assert words[:2] == ["python", "ppo_continuous.py"]
    args = json.loads(tyro.cli(ppo.Args, args=words[2:]).model_dump_json())
    assert args | {"run_dir": ""} == result(trained)["args"] | {"run_dir": ""}


def test_members_of_a_grid_are_grouped_by_their_settings(tmp_path, ppo):
    members = [{"seed": seed, "gamma": gamma} for gamma in (0.9, 0.9876543210) for seed in (1, 2)]
    folder = run_folder(tmp_path / "grid", members, seeds=(1, 2, 1, 2))
    for i, member in enumerate(members):
        write(folder / ppo.member_name(member), [i, i + 1, i + 2, i + 3])
    low, high = tables.collect([tmp_path])
    assert (low["name"], high["name"]) == ("Task-v0 ppo gamma=0.9", "Task-v0 ppo gamma=0.987654")
    assert low["seeds"] == high["seeds"] == [1, 2]
    assert low["returns"] == [[0, 1, 2, 3], [1, 2, 3, 4]]
    assert high["returns"] == [[2, 3, 4, 5], [3, 4, 5, 6]]
    assert low["seconds"] == [8, 16, 24, 32]  # four members' steps at 50 a second


def test_seeds_of_a_setting_come_together_and_other_settings_do_not(tmp_path):
    for seed in (1, 2):
        write(run_folder(tmp_path / f"seed{seed}", seeds=(seed,)), [seed] * 4)
    write(run_folder(tmp_path / "again", seeds=(2,)), [9] * 4)  # seed 2 is there already
    write(run_folder(tmp_path / "other", gamma=0.5), [5] * 4)
    entries = tables.collect([tmp_path])
    assert sorted(len(entry["seeds"]) for entry in entries) == [1, 2]
    labels = tables.label_all(entries)
    assert sorted(labels) == ["ppo --gamma 0.5", "ppo --gamma 0.9"]


def test_what_a_resumed_run_made_void_is_no_longer_there(tmp_path):
    folder = run_folder(tmp_path / "run")
    write(folder, [1, 2, 30, 40])
    time.sleep(1.1)  # event files are ordered by their second
    write(folder, [3, 4], start=200)
    (entry,) = tables.collect([folder])
    assert entry["returns"] == [[1, 2, 3, 4]]


def test_collected_entries_are_read_as_they_were(tmp_path):
    write(run_folder(tmp_path / "run"), [1, 2, 3, 4])
    entries = tables.collect([tmp_path])
    assert tables.entries_in(json.loads(json.dumps(entries))) == entries


def test_readme_is_what_the_results_and_remarks_say():
    assert (ROOT / "benchmarks/README.md").read_text() == tables.readme()


def test_means_of_long_runs_are_those_of_their_records():
    for budget, means in tables.load("long").items():
        entries = tables.entries_in(tables.load(f"long_{budget.lower()}"))
        played = {entry["env_id"]: tables.played_of(entry).mean() for entry in entries}
        assert means == pytest.approx(played, abs=0.01)


def test_readme_links_to_files_that_are_there():
    text = (ROOT / "benchmarks/README.md").read_text()
    links = re.findall(r"\]\((results/[^)]+)\)", text)
    assert len(links) > 10
    assert all((ROOT / "benchmarks" / link).exists() for link in links)


def test_published_figures_have_a_protocol():
    for source in tables.REFERENCES["source"]:
        assert source["name"] and source["protocol"] and source["steps"] >= 0
        assert all(1 <= len(figure) <= 3 for figure in source["figures"].values())


def test_intervals_hold_the_statistic_and_are_the_same_again():
    seeds = np.random.default_rng(0).normal(size=(8, 3))
    low, high = tables.interval(seeds, tables.middle)
    assert np.all(low < tables.middle(seeds)) and np.all(tables.middle(seeds) < high)
    np.testing.assert_array_equal(tables.interval(seeds, tables.middle), (low, high))


def test_seeds_that_never_arrive_count_as_the_slowest():
    entry = {"steps": [1, 2, 3], "returns": [[0, 5, 9], [5, 5, 5], [0, 0, 0]]}
    np.testing.assert_array_equal(tables.reached(entry, 5, "bar"), [2, 1, tables.NEVER])
    solved = entry | {"solved_at": [7, None, 8]}
    np.testing.assert_array_equal(tables.reached(solved, 5, "solved"), [7, tables.NEVER, 8])
    assert tables.within(np.full(4, tables.NEVER)) == "never"
    assert tables.within(np.array([1e3, 1e3, 1e3, tables.NEVER])).startswith("1k [1k, ")


@needs_page
def test_comparisons_are_of_shared_environments_and_normalised():
    report = importlib.import_module("benchmarks.report")
    entries = [
        {"name": f"{env} {name}", "env_id": env, "episodic_return": [base, base + 1, base + 2]}
        for env in ("A", "B")
        for name, base in (("low", 0), ("high", 8))
    ]
    entries.append({"name": "C low", "env_id": "C", "episodic_return": [1, 2]})
    scores = report.comparable(entries)
    np.testing.assert_allclose(scores["low"], [[0, 0], [0.1, 0.1], [0.2, 0.2]])
    np.testing.assert_allclose(scores["high"], [[0.8, 0.8], [0.9, 0.9], [1, 1]])
    (row,) = report.comparison_plots(scores)["Probability of improvement"]["rows"]
    assert row == {"label": "low > high", "drawn": [0, 0, 0]}


@needs_page
def test_a_picture_has_a_panel_an_environment(trained, tmp_path):
    from benchmarks import report

    entries = tables.collect([trained])
    report.draw([*entries, entries[0] | {"env_id": "Other-v0"}], tmp_path / "two.png")
    report.draw(entries, tmp_path / "one.png")
    shapes = [iio.imread(tmp_path / f"{name}.png").shape for name in ("one", "two")]
    assert shapes == [(400, 500, 4), (400, 1000, 4)]


@needs_page
@needs_chromium
def test_the_page_opens_in_a_browser_without_an_error(trained, tmp_path):
    other = run_folder(tmp_path / "runs/other", seeds=(1, 2))
    for seed in (1, 2):
        write(other / f"seed{seed}", [1, 2, 3, 4])
    page = tmp_path / "page.html"
    line = [sys.executable, "-m", "benchmarks.report", trained, tmp_path / "runs", "--out", page]
    subprocess.run(list(map(str, line)), check=True, cwd=ROOT, env=environment())
    assert page.stat().st_size < 5e6
    text = page.read_text()
    assert not re.search(r"""(src|href)=["'](http|//)""", text.split('id="plotly"')[0])
    browser = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--v=0"]
    browser += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    browser += ["--virtual-time-budget=20000", "--dump-dom", page.as_uri()]
    found = subprocess.run(browser, check=True, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in found.stderr
    assert 'data-ready="yes"' in found.stdout
    assert found.stdout.count('class="main-svg"') >= 1
    drawn = re.search(r'id="plots">(.*?)</script>', found.stdout, re.DOTALL).group(1)
    plots = json.loads(html.unescape(drawn))
    (line,) = plots["plot0"]["lines"]
    seeds = [[y for _, y in scalars(trained / f"seed{seed}")[RETURN]] for seed in (1, 2)]
    np.testing.assert_allclose(line["mean"][0], np.mean(seeds, axis=0), rtol=1e-3)
