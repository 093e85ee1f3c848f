"""Whether a change of the code changed what is computed: seeded curves now against saved ones.

    python -m benchmarks.same_curves --save  # before the change
    python -m benchmarks.same_curves         # after it

Three tasks per script, every scalar of every iteration but those that measure time. For each task
it prints the first iteration in which a scalar differs at all, and in which one differs by more
than 1 % of its size: a change that moves only the order of roundings shows the first early and the
second late, as chaos makes of the former the latter. The saved curves are those of one machine:
elsewhere, save them anew from the old commit (--scripts FOLDER has its scripts).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
SAVED = ROOT / "benchmarks/results/same_curves.json"
FAST = (
    "--num-envs 64 --num-steps 32 --num-minibatches 32 --recompute-advantages --no-norm-adv"
    " --no-clip-vloss --vf-coef 0.25 --log-std-init -0.5 --critic-sizes 64 64"
)
CLEANRL = (
    "--num-minibatches 32 --no-recompute-advantages --norm-adv --clip-vloss --vf-coef 0.5"
    " --log-std-init 0 --critic-sizes 64 64"
)
ONE = f"--num-envs 1 --num-steps 2048 {CLEANRL}"
CASES = {
    "one environment": f"ppo_continuous.py --env-id HalfCheetah-v4 --total-timesteps 40960 {ONE}",
    "fast": f"ppo_continuous.py --env-id Hopper-v4 --total-timesteps 40960 --num-seeds 2 {FAST}",
    "gymnasium, KL penalty": f"ppo_continuous.py --env-id gymnasium:Pendulum-v1 {CLEANRL}"
    " --num-envs 8 --num-steps 256 --total-timesteps 20480"
    " --objective kl-penalty --adaptive-lr --no-anneal-lr",
    "PPO-CMA": "ppo_cma.py --total-timesteps 40000",
    "PPO-CMA, MuJoCo": "ppo_cma.py --env-id Hopper-v4 --action-repeat 2 --num-envs 8"
    " --batch-size 512 --total-timesteps 64000",
    "PPO-CMA, full covariance": "ppo_cma.py --env-id Pendulum-v1 --covariance full"
    " --action-repeat 1 --num-envs 2 --total-timesteps 10000",
}
MEASURED = ("charts/SPS",)  # times, not numbers


def curves(command: str, scripts: Path) -> dict[str, list[float]]:
    """Returns {tag: values} of a run of a command, several seeds' tags by seed."""
    with tempfile.TemporaryDirectory() as folder:
        script, *flags = command.split()
        run = [sys.executable, str(scripts / script), *flags, "--run-dir", folder]
        subprocess.run(run, check=True, capture_output=True)
        found = {}
        for events in sorted({path.parent for path in Path(folder).rglob("events.out.tfevents.*")}):
            reader = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
            for tag in reader.Tags()["scalars"]:
                name = f"{events.relative_to(folder)}/{tag}"
                found[name] = [event.value for event in reader.Scalars(tag)]
    return {name: x for name, x in found.items() if not name.endswith(MEASURED)}


def first_difference(old: dict, new: dict, tolerance: float) -> int | None:
    """Returns the first iteration in which a curve differs by more than tolerance of its size."""
    firsts = []
    for name in old.keys() & new.keys():
        before, after = np.array(old[name]), np.array(new[name])
        size = np.maximum(np.abs(before), np.abs(after))
        differs = np.abs(before - after) > tolerance * size
        if differs.any():
            firsts.append(int(differs.argmax()) + 1)
    return min(firsts, default=None)


def main(save: bool = False, scripts: Path = ROOT) -> None:
    """Saves the curves, or compares.

    Args:
        save: writes benchmarks/results/same_curves.json instead of comparing with it.
        scripts: folder of the scripts to run.
    """
    now = {name: curves(command, scripts) for name, command in CASES.items()}
    if save:
        SAVED.write_text(json.dumps(now) + "\n")
        return
    saved = json.loads(SAVED.read_text())
    for name, new in now.items():
        old = saved[name]
        iterations = max(len(x) for x in new.values())
        print(
            f"{name}: {len(old.keys() & new.keys())} curves of {iterations} iterations;"
            f" first difference at all in iteration {first_difference(old, new, 0)},"
            f" above 1 % in {first_difference(old, new, 0.01)};"
            f" only before: {sorted(old.keys() - new.keys())},"
            f" only now: {sorted(new.keys() - old.keys())}"
        )


if __name__ == "__main__":
    tyro.cli(main)
