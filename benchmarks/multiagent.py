"""What ppo_multiagent.py reaches: MAPPO and IPPO on the same tasks and seeds, sampled evaluation.

    python benchmarks/multiagent.py  # all tasks, hours; goes on where it was
    python benchmarks/multiagent.py --tasks lbf-8x8-mappo lbf-8x8-ippo --num-seeds 5

Writes benchmarks/results/multiagent.json and multiagent.png. Returns are the team's.
"""

import tyro
from memory import Task, measure
from speed import ROOT

JUMANJI = "--log-interval 10"
LONG = f"{JUMANJI} --num-envs 256 --num-minibatches 8"
SMALL = f"{JUMANJI} --scenario 2s-8x8-2p-2f-coop"
FORAGING = "jumanji/LevelBasedForaging-v0"
WAREHOUSE = "jumanji/RobotWarehouse-v0"
MEETING = "jaxmarl/MPE_simple_spread_v3"
PLATES = "benchmarks.envs:PressurePlate-4p-v0"
# OpenAI's reward adds three agents' collisions with themselves in 25 steps, and halves nothing:
# MAPPO's -133.5 in arXiv 2006.07869 is, if that was its reward, about 2 of JaxMARL's and -75
SPREAD = (75 - 133.5) / 2
PAIRS = {  # each is run as MAPPO and as IPPO
    "lbf-8x8": Task(FORAGING, 2_000_000, 0.99, f"{SMALL} --anneal-ent"),
    "lbf-8x8-gru": Task(FORAGING, 1_000_000, 0.99, f"{SMALL} --anneal-ent --recurrence gru"),
    "lbf-10x10": Task(FORAGING, 20_000_000, 0.97, f"{LONG} --scenario 10x10-3p-3f"),
    "rware-tiny-2ag": Task(WAREHOUSE, 20_000_000, 16, f"{LONG} --scenario tiny-2ag"),
    "rware-tiny-2ag-3m": Task(WAREHOUSE, 3_000_000, 16, f"{LONG} --scenario tiny-2ag"),
    "rware-tiny-4ag": Task(WAREHOUSE, 20_000_000, 24, f"{LONG} --scenario tiny-4ag"),
    "spread": Task(MEETING, 2_000_000, SPREAD, f"{LONG} --gamma 0.95"),
    "spread-gamma99": Task(MEETING, 2_000_000, SPREAD, LONG),
    "spread-20m": Task(MEETING, 20_000_000, SPREAD, f"{LONG} --gamma 0.95"),
    "lbf-original": Task("lbforaging:Foraging-8x8-3p-2f-v3", 300_000, 3 * 0.25),
    "rware-original": Task("rware:rware-tiny-2ag-v2", 1_500_000, 1),  # a delivery
    "pressureplate": Task(PLATES, 1_000_000, 4 * -19.27, "--ent-coef 0.05 --anneal-ent"),
    "pressureplate-defaults": Task(PLATES, 1_000_000, 4 * -19.27),
}
TASKS = {
    f"{name}-{algorithm}": task._replace(flags=f"{task.flags} --algorithm {algorithm}")
    for name, task in PAIRS.items()
    for algorithm in ("mappo", "ippo")
}


def main(tasks: tuple[str, ...] = tuple(TASKS), num_seeds: int = 5) -> None:
    """Runs what is missing of tasks."""
    asked = {name: TASKS[name] for name in tasks}
    path = ROOT / "benchmarks/results/multiagent.json"
    measure(asked, "ppo_multiagent.py", num_seeds, path)


if __name__ == "__main__":
    tyro.cli(main)
