"""Speed of our scripts against other people's: whole runs, in turn, on one machine.

    python -m benchmarks.speed  # lists what there is to compare
    python -m benchmarks.speed halfcheetah pong "cost-*" --peer-python ../peers/bin/python
    python -m benchmarks.speed cartpole hopper --peer-python ../peers/bin/python \\
        --checkouts purejaxrl ../purejaxrl jaxmarl ../JaxMARL ppocma ../ppocma

The peers are functions of benchmarks/peers.py, which says what their Python needs. Steps per second
are summed over seeds and leave compilation out; a step is one of all agents of a team. Seconds run
from pressing return until the last 100 training episodes' mean is at a goal, imports and
compilation included, or to the end where it never is. A ratio is of medians, and above 1 where
ours is the faster. What is found replaces what benchmarks/results/speed.json had of that name.
"""

import fnmatch
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import peers

ROOT = Path(__file__).parents[1]
RETURN = "charts/episodic_return_100"


@dataclass(frozen=True)
class Comparison:
    """A run of ours and one of a peer's, which may be another run of ours."""

    what: str
    ours: str  # script and flags
    steps: int  # of ours, per seed
    peer: Callable | str  # a function of peers.py, or a command of ours
    peer_steps: int
    goal: float | None = None  # a return that stops the clock; None: steps per second
    checkout: str = ""  # that the peer needs
    here: bool = False  # the peer runs in our Python
    settings: dict = field(default_factory=dict)  # further arguments of the peer


class Measured(NamedTuple):  # what a run had
    value: float  # steps per second, or seconds
    versions: dict[str, str]
    device: str = ""


class Options(NamedTuple):  # of the command line
    rounds: int
    scale: float
    peer_python: str
    checkouts: dict[str, Path]
    flags: str


CLEANRL = (  # Stable-Baselines3's defaults are much the same
    "ppo_continuous.py --env-id HalfCheetah-v4 --num-envs 1 --num-steps 2048 --num-minibatches 32"
    " --no-recompute-advantages --norm-adv --clip-vloss --vf-coef 0.5 --log-std-init 0"
    " --critic-sizes 64 64"
)
EIGHT = f"{CLEANRL} --num-envs 8 --num-steps 256"
PONG = "ppo_atari.py --env-id Pong-v5"
LSTM = (
    "ppo_icm_lstm.py --env-id CartPole-v1 --num-envs 8 --num-steps 128 --num-minibatches 8"
    " --recurrence lstm --memory-size 64 --hidden-sizes 64 64 --critic-sizes 64 64"
)
PLAIN = (
    "--env-id HalfCheetah-v4 --num-envs 16 --num-steps 128 --num-minibatches 8 --norm-adv"
    " --no-recompute-advantages --critic-sizes 64 64 --vf-coef 0.5 --log-std-init 0"
    " --learning-rate 1e-3"
)
CARTPOLE = (
    "ppo_icm_lstm.py --env-id gymnax/CartPole-v1 --num-envs 4 --num-steps 128 --num-minibatches 4"
    " --update-epochs 4 --learning-rate 2.5e-4 --clip-vloss --log-interval 100"
    " --checkpoint-interval 1000 --no-norm-obs --no-norm-reward"
)
GRU = (
    f"{CARTPOLE} --recurrence gru --memory-size 128 --hidden-sizes 128 --critic-sizes 128"
    " --activation relu"
)
MINATAR = (
    "ppo_atari.py --env-id gymnax/Breakout-MinAtar --num-envs 64 --num-steps 128"
    " --num-minibatches 8 --learning-rate 5e-3 --clip-coef 0.2 --network mlp --hidden-sizes 64 64"
    " --critic-sizes 64 64 --log-interval 10"
)
BRAX = (
    "ppo_continuous.py --env-id brax/hopper --num-steps 10 --update-epochs 4 --no-anneal-lr"
    " --hidden-sizes 256 256 --critic-sizes 256 256 --no-recompute-advantages --norm-adv"
    " --clip-vloss --vf-coef 0.5 --log-std-init 0 --log-interval 10"
    ' --env-kwargs {"backend":"positional"}'
)
HOPPER = f"{BRAX} --num-envs 2048 --num-minibatches 32"
SMALL_HOPPER = f"{BRAX} --num-envs 64 --num-minibatches 4"
TEAM = "ppo_multiagent.py --num-envs 64 --log-interval 10 --checkpoint-interval 1000"
IPPO = (
    f"{TEAM} --env-id jaxmarl/MPE_simple_spread_v3 --algorithm ippo --num-steps 128"
    " --num-minibatches 4 --update-epochs 4 --learning-rate 2.5e-4 --hidden-sizes 64 64"
    " --critic-sizes 64 64 --activation tanh --clip-vloss"
)
GRID = "ppo_continuous.py --env-id gymnax/Pendulum-v1 --log-interval 10"
PENDULUM = "ppo_continuous.py --num-steps 32 --critic-sizes 256 256 --log-interval 10"


def halfcheetah(ours: str, flags: str, steps: int) -> Comparison:
    """Returns a comparison with Stable-Baselines3 at 1 x 2048."""
    what = f"HalfCheetah-v4: CleanRL's settings, {ours}, over Stable-Baselines3, 1 x 2048"
    return Comparison(what, flags, steps, peers.sb3_halfcheetah, 4096)


def sooner(what: str, goal: float) -> Comparison:
    """Returns a comparison of seconds with Stable-Baselines3, of which it runs the first 5 %."""
    what = f"HalfCheetah-v4: seconds to {what}, both with their own defaults;"
    what += " Stable-Baselines3's are those of 1M steps, extrapolated from 51200"
    flags = "ppo_continuous.py --env-id HalfCheetah-v4"
    return Comparison(what, flags, 1_000_000, peers.sb3_halfcheetah_score, 51200, goal)


def purejaxrl(what: str, ours: str, steps: int, peer: Callable) -> Comparison:
    """Returns a comparison with PureJaxRL."""
    return Comparison(f"{what} over PureJaxRL", ours, steps, peer, steps, checkout="purejaxrl")


def alone(env_id: str, scenario: str = "") -> Comparison:
    """Returns a comparison of learning with stepping an environment at random."""
    task = f"{env_id} --scenario {scenario}" if scenario else env_id
    what = f"{task}: whole runs over the environment alone"
    ours = f"{TEAM} --env-id {task}"
    settings = {"env_id": env_id, "scenario": scenario}
    return Comparison(what, ours, 204800, peers.bare, 204800, here=True, settings=settings)


def cma(what: str, flags: str, steps: int = 120_000) -> Comparison:
    """Returns a comparison with PPO-CMA's authors' code."""
    what = f"MountainCarContinuous-v0: {what} over PPO-CMA's authors' code"
    ours = f"ppo_cma.py {flags}"
    return Comparison(what, ours, steps, peers.authors_cma, 40_000, checkout="ppocma")


def pendulum(env_id: str, envs: int, seeds: int) -> tuple[str, int]:
    """Returns a run of minibatches of 256 rows, or of its whole rollout, and its steps."""
    minibatches = max(envs * 32 // 256, 1)
    flags = f"{PENDULUM} --env-id {env_id} --num-envs {envs} --num-seeds {seeds}"
    return f"{flags} --num-minibatches {minibatches}", max(320 * envs, 40960 // seeds)


def costs() -> dict[str, Comparison]:
    """Returns comparisons of many environments with one, and of many seeds with one."""
    found = {}
    for place, env_id in {"host": "Pendulum-v1", "device": "gymnax/Pendulum-v1"}.items():
        for envs in (4, 16, 64, 256, 1024, 4096):
            what = f"{env_id}, on the {place}: {envs} environments over 1"
            many = pendulum(env_id, envs, 1)
            one = pendulum(env_id, 1, 1)
            found[f"cost-{place}-{envs}-environments"] = Comparison(what, *many, *one)
        for seeds in (2, 4, 8, 16, 32, 64):
            what = f"{env_id}, on the {place}: {seeds} seeds over 1, of 64 environments each"
            many = pendulum(env_id, 64, seeds)
            one = pendulum(env_id, 64, 1)
            found[f"cost-{place}-{seeds}-seeds"] = Comparison(what, *many, *one)
    return found


COMPARISONS = {
    "halfcheetah": halfcheetah("1 x 2048", CLEANRL, 40960),
    "halfcheetah-8x256": halfcheetah("8 x 256", EIGHT, 81920),
    "halfcheetah-seeds": halfcheetah("8 seeds of 1 x 2048", f"{CLEANRL} --num-seeds 8", 20480),
    "halfcheetah-8x256-seeds": halfcheetah("8 seeds of 8 x 256", f"{EIGHT} --num-seeds 8", 20480),
    "halfcheetah-score": sooner("a return of 1443", goal=1443),
    "halfcheetah-1m": sooner("the end of 1M steps", goal=math.inf),
    "pong": Comparison(
        "Pong from pixels, 8 x 128, over Stable-Baselines3", PONG, 20480, peers.sb3_pong, 20480
    ),
    "pong-score": Comparison(
        "Pong from pixels: seconds to a return of -10, or 1.5M steps, over Stable-Baselines3",
        PONG,
        1_500_000,
        peers.sb3_pong_score,
        1_500_000,
        goal=-10,
    ),
    "lstm": Comparison(
        "CartPole-v1: an LSTM over sb3-contrib's", LSTM, 102400, peers.sb3_contrib_lstm, 20480
    ),
    "no-memory": Comparison(
        "HalfCheetah-v4: ppo_icm_lstm.py without memory over ppo_continuous.py",
        f"ppo_icm_lstm.py {PLAIN} --ent-coef 0",
        204800,
        f"ppo_continuous.py {PLAIN}",
        204800,
    ),
    "cartpole": purejaxrl("CartPole-v1", CARTPOLE, 1_024_000, peers.purejaxrl_cartpole),
    "cartpole-gru": purejaxrl("CartPole-v1: a GRU", GRU, 102400, peers.purejaxrl_gru),
    "minatar": purejaxrl("MinAtar's Breakout", MINATAR, 655360, peers.purejaxrl_minatar),
    "minatar-seeds": Comparison(
        "MinAtar's Breakout: 16 seeds over 1", f"{MINATAR} --num-seeds 16", 163840, MINATAR, 655360
    ),
    "hopper": purejaxrl("Brax's hopper, 2048 x 10", HOPPER, 409600, peers.purejaxrl_hopper),
    "hopper-seeds": Comparison(
        "Brax's hopper, 64 x 10: 16 seeds over 1",
        f"{SMALL_HOPPER} --num-seeds 16",
        12800,
        SMALL_HOPPER,
        128_000,
    ),
    "grid": Comparison(
        "gymnax/Pendulum-v1: seconds of 8 members of a grid over those of one run",
        f"{GRID} --grid learning_rate=1e-4,3e-4,1e-3,3e-3 gamma=0.98,0.99",
        100_000,
        GRID,
        100_000,
        goal=math.inf,
    ),
    "foraging": alone("jumanji/LevelBasedForaging-v0", "2s-8x8-2p-2f-coop"),
    "warehouse-2ag": alone("jumanji/RobotWarehouse-v0", "tiny-2ag"),
    "warehouse-4ag": alone("jumanji/RobotWarehouse-v0", "tiny-4ag"),
    "spread": alone("jaxmarl/MPE_simple_spread_v3"),
    "spread-ippo": Comparison(
        "simple_spread: IPPO with 64 environments over JaxMARL's ippo_ff_mpe.py",
        IPPO,
        819_200,
        peers.jaxmarl_spread,
        819_200,
        checkout="jaxmarl",
    ),
    "cma": cma("the defaults", "", 200_000),
    "cma-4-seeds": cma("4 seeds", "--num-seeds 4"),
    "cma-5-seeds": cma("5 seeds", "--num-seeds 5"),
    "cma-repeat-2": cma("decisions held for 2 steps, as theirs,", "--action-repeat 2"),
    **costs(),
}


def output(line: list[str]) -> str:
    """Returns what a program prints; where it fails, shows what it said and ends."""
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{done.stderr}\n{' '.join(line)}\nended with {done.returncode}")
    return done.stdout


def reached(folder: str, goal: float) -> float:
    """Returns when a run's last 100 training episodes' mean was at a goal; inf if it never was."""
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    if RETURN not in events.Tags()["scalars"]:
        return math.inf
    found = [event.wall_time for event in events.Scalars(RETURN) if event.value >= goal]
    return min(found, default=math.inf)


def run_ours(command: str, goal: float | None) -> Measured:
    """Returns what a run of a script of ours had."""
    with tempfile.TemporaryDirectory() as folder:
        pressed = time.time()
        output([sys.executable, *command.split(), "--run-dir", folder])
        ended = time.time()
        result = json.loads((Path(folder) / "result.json").read_text())
        value = result["sps"]
        if goal is not None:
            value = min(reached(folder, goal), ended) - pressed
    if value is None:
        sys.exit(f"{command}\nends with the first look at it, too soon for a speed")
    return Measured(value, result["versions"], result["device"])


def run_peer(comparison: Comparison, options: Options) -> Measured:
    """Returns what a run of the peer had."""
    steps = int(comparison.peer_steps * options.scale)
    if isinstance(comparison.peer, str):
        command = f"{comparison.peer} --total-timesteps {steps} {options.flags}"
        return run_ours(command, comparison.goal)
    settings = comparison.settings | {"steps": steps}
    if comparison.checkout:
        settings["checkout"] = str(options.checkouts[comparison.checkout].absolute())
    if comparison.goal is not None:
        settings["whole"] = int(comparison.steps * options.scale)
        settings |= {"goal": comparison.goal, "pressed": time.time()}
    python = sys.executable if comparison.here else options.peer_python
    line = [python, "-m", "benchmarks.peers", comparison.peer.__name__, json.dumps(settings)]
    return Measured(**json.loads(output(line).splitlines()[-1]))


def compare(comparison: Comparison, options: Options) -> dict:
    """Returns all values of both, run in turn, and the ratio of their medians."""
    steps = int(comparison.steps * options.scale)
    command = f"{comparison.ours} --total-timesteps {steps} {options.flags}"
    values: dict[str, list[float]] = {"ours": [], "peer": []}
    last: dict[str, Measured] = {}
    for number in range(options.rounds):
        turn = ("ours", "peer") if number % 2 == 0 else ("peer", "ours")
        for side in turn:
            if side == "ours":
                found = run_ours(command, comparison.goal)
            else:
                found = run_peer(comparison, options)
            last[side] = found
            values[side].append(found.value)
    ratio = float(np.median(values["ours"]) / np.median(values["peer"]))
    return {
        "what": comparison.what,
        **values,
        "unit": "steps per second" if comparison.goal is None else "seconds",
        "ratio": ratio if comparison.goal is None else 1 / ratio,
        "run": " ".join(["python", *command.split()]),
        "versions": last["ours"].versions,
        "peer_versions": last["peer"].versions,
        "device": last["ours"].device,
    }


def main(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    rounds: int = 3,
    scale: float = 1.0,
    peer_python: str = sys.executable,
    checkouts: dict[str, Path] | None = None,
    flags: str = "",
    out: Path = ROOT / "benchmarks/results/speed.json",
) -> None:
    """Compares, and writes what each comparison finds.

    Args:
        names: comparisons, or patterns such as "cma*"; none: lists all.
        rounds: runs of each side.
        scale: what all numbers of steps are multiplied by.
        peer_python: the Python that has the peers.
        checkouts: the peers' names and folders.
        flags: further flags of ours, such as "--platform gpu".
        out: the results' file.
    """
    unknown = [name for name in names if not fnmatch.filter(COMPARISONS, name)]
    if unknown:
        sys.exit(f"there is no {', '.join(unknown)}; without a name, all are listed")
    # Not resolved: a virtual environment's Python is a link
    python = str(Path(peer_python).absolute())
    options = Options(rounds, scale, python, checkouts or {}, flags)
    for name, comparison in COMPARISONS.items():
        if not names:
            print(f"{name}: {comparison.what}")
        if not any(fnmatch.fnmatch(name, pattern) for pattern in names):
            continue
        if comparison.checkout and comparison.checkout not in options.checkouts:
            print(f"{name}: left out, as it needs --checkouts {comparison.checkout} FOLDER")
            continue
        found = compare(comparison, options)
        found["command"] = f"python -m benchmarks.speed {name}"
        content = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps(content | {name: found}, indent=2) + "\n")
        print(f"{name}: {found['ratio']:.2f}, of {found['unit']}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
