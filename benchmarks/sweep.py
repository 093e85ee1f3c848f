"""Trains and evaluates what is missing of a suite, on this machine or on a Slurm cluster.

    python -m benchmarks.sweep benchmarks/suites/quick.toml  # again: completes what is missing
    python -m benchmarks.sweep benchmarks/suites/memory.toml --only cartpole --dry-run
    python -m benchmarks.sweep benchmarks/suites/mujoco-1m.toml --executor slurm \\
        --slurm timeout_min=600 cpus_per_task=8 gpus_per_node=1  # submitit's parameters
    python -m benchmarks.sweep benchmarks/suites/tune.toml --tune  # Optuna draws the grid

A suite is a TOML file. What stands above the first [[runs]] holds for all of them, flags included:

    script = "ppo_continuous.py"
    total_timesteps = 1_000_000  # per member; without it the script's default, as for all flags
    seeds = 10
    eval_episodes = 100  # 0: no evaluation

    [[runs]]
    name = "narrow"
    env_id = ["HalfCheetah-v4", "Hopper-v4"]
    flags = "--hidden-sizes 32 32"
    grid = { learning_rate = [1e-4, 3e-4, 1e-3], gamma = [0.98, 0.99] }

Seeds and grid of a script and an environment are members of one process. It has a run folder,
runs/<suite>/<environment>/<name>, with its output in sweep.log. A run is done when its result.json
says that this command has finished, and has the evaluation. Failed runs are listed at the end.
"""

import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from pydantic import BaseModel, Field, ValidationError, model_validator
from rich.console import Console
from rich.live import Live
from rich.table import Table

PROGRESS = re.compile(r"(\S+ of \S+) steps, .*return (\S+)")
COLOURS = {"running": "cyan", "failed": "red", "waiting": "dim", "done": "green"}


# --- Suites ---
class Run(BaseModel, extra="forbid"):
    script: str
    env_id: str  # of a list, each is a run
    name: str = ""  # of the experiment; empty: the script's
    flags: str = ""
    grid: dict[str, list[float | str]] = {}  # name or name:name, values, as of --grid
    seed: int = 1  # the first
    seeds: int = Field(1, ge=1)
    total_timesteps: int | None = None
    eval_episodes: int = Field(100, ge=0)
    eval_flags: str = ""


class Range(BaseModel, extra="forbid"):
    low: float
    high: float
    log: bool = False


class Tune(BaseModel, extra="forbid"):
    members: int = Field(8, ge=1)  # points of an ask, trained in one process
    asks: int = Field(5, ge=1)
    metric: Literal["episodic_return", "eval_return"] = "episodic_return"  # mean over seeds
    range: dict[str, Range]


class Suite(BaseModel, extra="forbid"):
    name: str
    runs: list[Run]
    tune: Tune | None = None

    @model_validator(mode="before")
    @classmethod
    def share(cls, content: dict) -> dict:
        """Returns the content of a TOML file with what holds for all runs in each of them."""
        shared = {key: x for key, x in content.items() if key not in cls.model_fields}
        runs = []
        for run in content.get("runs", [{}]):
            whole = shared | run
            whole["flags"] = f"{shared.get('flags', '')} {run.get('flags', '')}"
            env_ids = whole.get("env_id", [])
            for env_id in env_ids if isinstance(env_ids, list) else [env_ids]:
                runs.append(whole | {"env_id": env_id})
        own = {key: x for key, x in content.items() if key not in shared}
        return {**own, "runs": runs}


class Job(NamedTuple):  # one process, which trains, and a second one, which evaluates
    name: str
    folder: Path  # run folder
    training: list[str]  # command lines, without Python
    evaluation: list[str]  # or none


def read_suite(path: Path) -> Suite:
    """Returns a suite.

    Raises: SystemExit where it cannot be read, or two of its runs would have one folder.
    """
    try:
        suite = Suite(name=path.stem, **tomllib.loads(path.read_text()))
    except ValidationError as error:
        rows = [f"{'.'.join(map(str, row['loc']))}: {row['msg']}" for row in error.errors()]
        refuse(f"{path}: {'; '.join(rows)}")
    except (OSError, tomllib.TOMLDecodeError) as error:
        refuse(f"{path}: {error}")
    names = [name_of(run) for run in suite.runs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        refuse(f"{path}: runs need names of their own: {', '.join(sorted(twice))}")
    return suite


def refuse(message: str) -> None:
    """Ends this program as one whose input is bad."""
    print(f"sweep: {message}", file=sys.stderr)
    sys.exit(2)


def make_job(run: Run, folder: Path, part: str = "") -> Job:
    """Returns the job of a run, or of a part of it with a name of its own, in a suite's folder."""
    name = "/".join(filter(None, (name_of(run), part)))
    folder = folder / name
    training = [run.script, "--env-id", run.env_id, *shlex.split(run.flags)]
    training += ["--run-dir", str(folder)]
    training += ["--exp-name", run.name] if run.name else []
    training += ["--total-timesteps", str(run.total_timesteps)] if run.total_timesteps else []
    training += ["--seed", str(run.seed)] if run.seed != 1 else []
    training += ["--num-seeds", str(run.seeds)] if run.seeds != 1 else []
    if run.grid:
        values = [f"{key}={','.join(map(str, x))}" for key, x in run.grid.items()]
        training += ["--grid", *values]
    evaluation = []
    if run.eval_episodes:
        evaluation = [run.script, "--mode", "eval", "--run-dir", str(folder)]
        evaluation += ["--eval-episodes", str(run.eval_episodes), *shlex.split(run.eval_flags)]
    return Job(name, folder, training, evaluation)


def name_of(run: Run) -> str:
    """Returns what a run is called in its suite."""
    return f"{run.env_id}/{run.name or Path(run.script).stem}"


# --- Run folders ---
def log_of(job: Job) -> Path:
    """Returns the path of a job's output, whose first line is its command."""
    return job.folder / "sweep.log"


def command_of(line: list[str]) -> str:
    """Returns a command line as a user types it."""
    return f"python {shlex.join(line)}"


def read_result(job: Job) -> dict:
    """Returns the content of a job's result.json, nothing where there is none."""
    path = job.folder / "result.json"
    return json.loads(path.read_text()) if path.exists() else {}


def is_done(job: Job) -> bool:
    """Returns whether a job's command has finished and was evaluated."""
    result = read_result(job)
    log = log_of(job)
    if not result.get("finished") or not log.exists():
        return False
    same = log.read_text().partition("\n")[0] == f"$ {command_of(job.training)}"
    return same and (not job.evaluation or bool(result["eval_return"]))


def score_of(result: dict) -> float:
    """Returns the mean return of a result's members, evaluated where they were."""
    played = result["eval_return"]
    returns = [row["mean"] for row in played] if played else result["episodic_return"]
    return float(np.mean([x for x in returns if x is not None] or np.nan))


def last_words(job: Job, task: Any) -> str:
    """Returns the last line of a failed job's output; of an error in a box the first one."""
    log = log_of(job)
    if not log.exists():
        return str(task.exception()).strip().rpartition("\n")[2]
    text = log.read_text().strip()
    if text.endswith("╯"):
        return text.rpartition("╭")[2].splitlines()[1].strip("│ ")
    return text.rpartition("\n")[2]


def forget(jobs: list[Job]) -> None:
    """Removes what was said of jobs before they are started again."""
    for job in jobs:
        log_of(job).unlink(missing_ok=True)


def run_job(job: Job, env: dict[str, str], processes: list[subprocess.Popen]) -> int:
    """Trains and evaluates what is missing of a job; returns the exit code.

    Args:
        env: environment variables, besides this process's
        processes: where to put those that it starts
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with log_of(job).open("w") as log:
        for line in filter(None, (job.training, job.evaluation)):
            if line is job.evaluation and read_result(job)["eval_return"]:
                continue
            log.write(f"$ {command_of(line)}\n")
            log.flush()
            given = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            given |= {"start_new_session": True}  # only we pass signals on, each once
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # submitit's
            process = subprocess.Popen([sys.executable, *line], env=os.environ | env, **given)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            processes.append(process)
            while process.poll() is None:  # in a signal's handler, too
                time.sleep(0.2)
            if process.returncode:
                return process.returncode
    return 0


def stop(processes: list[subprocess.Popen]) -> None:
    """Has processes save and end."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    while any(process.poll() is None for process in processes):
        time.sleep(0.2)


# --- Executors ---
class Share(NamedTuple):  # of this machine, a worker's
    cores: list[int]
    env: dict[str, str]


def find_gpus() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return list(filter(None, os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return []
    return re.findall(r"^GPU (\d+):", listed, re.MULTILINE)


def make_shares(workers: int, jobs: int) -> list[Share]:
    """Returns the shares of workers, a number per device, with equal parts of the cores.

    Args:
        workers: 0 is one per GPU; without a GPU one per core, but no more than jobs
    """
    cores = sorted(os.sched_getaffinity(0))
    gpus = find_gpus()
    each = workers or (1 if gpus else min(len(cores), jobs))
    total = each * max(len(gpus), 1)
    shares = []
    for number in range(total):
        env = {}
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        if gpus and each > 1:
            env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # JAX takes most of a GPU at once
        size = max(len(cores) // total, 1)
        first = number * size % len(cores)
        shares.append(Share(cores[first : first + size], env))
    return shares


def run_here(job: Job, shares: queue.SimpleQueue, processes: list[subprocess.Popen]) -> int:
    """Runs a job on a share of this machine; returns the exit code."""
    share = shares.get()
    os.sched_setaffinity(0, share.cores)  # of this thread, and of what it starts
    code = run_job(job, share.env, processes)
    shares.put(share)
    return code


@contextmanager
def local_workers(workers: int, jobs: int) -> Iterator[Callable]:
    """Gives a function that starts jobs on this machine and returns their futures."""
    shares = queue.SimpleQueue()
    found = make_shares(workers, jobs)
    for share in found:
        shares.put(share)
    processes = []
    pool = ThreadPoolExecutor(len(found))

    def start(jobs: list[Job]) -> dict[str, Any]:
        forget(jobs)
        return {job.name: pool.submit(run_here, job, shares, processes) for job in jobs}

    try:
        yield start
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        stop(processes)


class OnNode:
    """run_job as submitit calls it; a job that Slurm ends has saved, and goes on when requeued."""

    def __init__(self) -> None:
        self.processes = []

    def __call__(self, job: Job) -> int:
        code = run_job(job, {}, self.processes)
        if code == 128 + signal.SIGTERM:
            sys.exit(code)  # submitit takes what is returned for a job's end
        return code

    def checkpoint(self, job: Job) -> Any:
        """Returns what submitit queues again as a job's time is up."""
        import submitit

        stop(self.processes)
        return submitit.helpers.DelayedSubmission(OnNode(), job)


@contextmanager
def cluster(name: str, suite: str, folder: Path, settings: dict[str, Any]) -> Iterator[Callable]:
    """Gives a function that submits jobs and returns submitit's; they outlive this program."""
    import submitit

    executor = submitit.AutoExecutor(folder / "submitit", cluster=name)
    defaults = {"timeout_min": 24 * 60, "name": suite}
    executor.update_parameters(**defaults | settings)
    queued = queued_ids() if name == "slurm" else set()

    def submit(jobs: list[Job]) -> dict[str, Any]:
        found = {}
        for job in jobs:
            path = job.folder / "slurm_id"
            if path.exists() and path.read_text() in queued:
                found[job.name] = submitit.SlurmJob(executor.folder, path.read_text())
        new = [job for job in jobs if job.name not in found]
        forget(new)
        submitted = executor.map_array(OnNode(), new) if new else []
        for job, task in zip(new, submitted, strict=True):
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / "slurm_id").write_text(task.job_id)
            found[job.name] = task
        return found

    yield submit


def queued_ids() -> set[str]:
    """Returns the ids of this user's jobs that Slurm runs or will run."""
    line = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    return set(subprocess.run(line, capture_output=True, text=True, check=True).stdout.split())


# --- Showing ---
class Row(NamedTuple):
    run: str
    state: str
    steps: str
    score: str
    minutes: str


def row_of(job: Job, task: Any, since: float) -> Row:
    """Returns what the table says of a job.

    Args:
        task: future of what was started; None: nothing had to be
        since: when it was seen to run, in seconds
    """
    log = log_of(job)
    if task is None or (task.done() and is_done(job)):
        result = read_result(job)
        score = f"{score_of(result):.4g}"
        return Row(job.name, "done", f"{result['timesteps']}", score, minutes(result["wall_time"]))
    if not task.done() and not log.exists():
        return Row(job.name, "waiting", "", "", "")
    text = log.read_text() if log.exists() else ""
    steps, score = (PROGRESS.findall(text) or [("", "")])[-1]
    state = "failed" if task.done() else "running"
    return Row(job.name, state, steps, score, minutes(time.time() - since))


def minutes(seconds: float) -> str:
    """Returns a time in minutes."""
    return f"{seconds / 60:.1f} min"


def make_table(rows: list[Row]) -> Table:
    """Returns the table, those first of whom there is something to see."""
    table = Table("run", "state", "steps", "return", "time")
    for row in sorted(rows, key=lambda row: list(COLOURS).index(row.state)):
        table.add_row(*row, style=COLOURS[row.state])
    return table


def follow(jobs: list[Job], tasks: dict[str, Any], console: Console) -> None:
    """Shows how jobs are, in a table or in lines, until those that were started are over."""
    rows, began = {}, {}
    live = Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext()
    over = False
    with live as shown:
        while not over:
            over = all(task.done() for task in tasks.values())
            for job in jobs:
                before = rows.get(job.name)
                if before and before.state in ("done", "failed"):
                    continue
                if log_of(job).exists():
                    began.setdefault(job.name, time.time())
                row = row_of(job, tasks.get(job.name), began.get(job.name, time.time()))
                if not shown and row.state != (before.state if before else "waiting"):
                    print(f"{row.run}: {', '.join(filter(None, row[1:]))}", flush=True)
                rows[job.name] = row
            if shown:
                shown.update(make_table(list(rows.values())), refresh=True)
            time.sleep(0 if over else 1)


def complete(jobs: list[Job], start: Callable, console: Console) -> list[Job]:
    """Runs what is missing of jobs, and returns those that failed, after saying how."""
    missing = [job for job in jobs if not is_done(job)]
    tasks = start(missing) if missing else {}
    follow(jobs, tasks, console)
    failed = [job for job in missing if not is_done(job)]
    for job in failed:
        task = tasks[job.name]
        code = "" if task.exception() else f"exit code {task.result()}, "
        print(f"{job.name} failed: {last_words(job, task)} ({code}{log_of(job)})")
    return failed


# --- Tuning ---
def open_study(run: Run, folder: Path) -> Any:
    """Returns Optuna's study of a run; it goes on where it was."""
    import optuna

    storage = f"sqlite:///{folder}/tune.db"
    settings = {"storage": storage, "direction": "maximize", "load_if_exists": True}
    study = optuna.create_study(study_name=name_of(run), **settings)
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials), constant_liar=True)
    return study


def ask(study: Any, tune: Tune) -> list[Any]:
    """Returns the trials of an ask, those first that nobody has told the end of."""
    from optuna.distributions import FloatDistribution
    from optuna.trial import TrialState

    ranges = {
        name: FloatDistribution(x.low, x.high, log=x.log) for name, x in sorted(tune.range.items())
    }
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        if trial.params.keys() != ranges.keys():
            study.tell(trial.number, state=TrialState.FAIL)
    for _ in range(tune.members - len(study.get_trials(states=(TrialState.RUNNING,)))):
        study.ask(ranges)
    return study.get_trials(states=(TrialState.RUNNING,))


def points_of(trials: list[Any]) -> dict[str, list[str]]:
    """Returns the grid whose points are those of trials: numbers that go together are joined."""
    names = sorted(trials[0].params)
    values = [":".join(str(trial.params[name]) for name in names) for trial in trials]
    return {":".join(names): values}


def tell(study: Any, trials: list[Any], job: Job, tune: Tune) -> None:
    """Tells a study what its trials have come to; those of a failed process have failed."""
    from optuna.trial import TrialState

    scores = np.full(len(trials), np.nan)
    if is_done(job):
        found = read_result(job)[tune.metric]
        returns = [row["mean"] if isinstance(row, dict) else row for row in found]
        scores = np.array(returns, float).reshape(len(trials), -1).mean(axis=1)
    for trial, score in zip(trials, scores, strict=True):
        if np.isfinite(score):
            study.tell(trial.number, float(score))
        else:
            study.tell(trial.number, state=TrialState.FAIL)


def tune_runs(suite: Suite, folder: Path, start: Callable, console: Console) -> list[Job]:
    """Asks and trains what is missing of a suite's asks, and returns the jobs that failed."""
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    tune = suite.tune
    studies = [(run, open_study(run, folder)) for run in suite.runs]
    failed = []
    while not failed:
        asked = []
        for run, study in studies:
            told = [trial for trial in study.trials if trial.state != TrialState.RUNNING]
            if len(told) < tune.asks * tune.members:
                trials = ask(study, tune)
                drawn = run.model_copy(update={"grid": points_of(trials)})
                asked.append((study, trials, make_job(drawn, folder, f"ask{trials[0].number}")))
        if not asked:
            break
        failed = complete([job for _, _, job in asked], start, console)
        for study, trials, job in asked:
            tell(study, trials, job, tune)
    for _, study in studies:
        trials = study.get_trials(states=(TrialState.COMPLETE,))
        for trial in sorted(trials, key=score_of_trial, reverse=True)[:3]:
            print(f"{study.study_name}: {trial.value:.4g} with {trial.params}")
    return failed


def score_of_trial(trial: Any) -> float:
    """Returns what a trial was told to have come to."""
    return trial.value


# --- Command line ---
def parsed(settings: tuple[str, ...]) -> dict[str, Any]:
    """Returns {name: value} of settings name=value; values are JSON, or text."""
    found = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def main(
    suite: tyro.conf.Positional[Path],
    only: tuple[str, ...] = (),
    tune: bool = False,
    workers: int = 0,
    executor: Literal["here", "slurm", "local"] = "here",
    slurm: tuple[str, ...] = (),
    dry_run: bool = False,
) -> None:
    """Completes a suite.

    Args:
        suite: TOML file
        only: those runs that have one of these words in their names; * stands for any letters
        tune: have Optuna draw the points of the suite's [tune]
        workers: processes at once per device; 0: one per GPU, or one per core where there is none
        executor: workers on this machine, or submitit, with Slurm or as it does without
        slurm: submitit's parameters, NAME=VALUE
        dry_run: print the commands that are missing, and run nothing
    """
    content = read_suite(suite)
    if only:
        runs = [
            run for run in content.runs if any(fnmatchcase(name_of(run), f"*{x}*") for x in only)
        ]
        content = content.model_copy(update={"runs": runs})
    if not content.runs or (tune and not content.tune):
        refuse(f"{suite} has no {'[tune]' if content.runs else 'such run'}")
    folder = Path("runs", content.name)
    jobs = [make_job(run, folder) for run in content.runs]
    if dry_run:
        for job in jobs:
            lines = [] if is_done(job) else [job.training, job.evaluation]
            print(*(f"{command_of(line)}\n" for line in lines if line), sep="", end="")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console()
    if executor == "here":
        place = local_workers(workers, len(jobs))
    else:
        place = cluster(executor, content.name, folder, parsed(slurm))
    try:
        with place as start:
            if tune:
                failed = tune_runs(content, folder, start, console)
            else:
                failed = complete(jobs, start, console)
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        sys.exit(128 + signal.SIGINT)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
