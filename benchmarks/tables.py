"""Entries and tables: what run folders and benchmarks/results/*.json say, and benchmarks/README.md.

An entry is a dict: what one setting of one script reached on one environment, with all of its
seeds. benchmarks/results/*.json hold entries as they are here; benchmarks/README.md is
benchmarks/remarks/*.md, in which a line such as `<!-- table: memory scores -->` stands for a table.
"""

import ast
import fnmatch
import json
import shlex
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap, trim_mean
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
REFERENCES = tomllib.loads((HERE / "references.toml").read_text())
RETURN = "charts/episodic_return_100"  # mean of the last 100 episodes
LENGTH = "charts/episodic_length"
SPEED = "charts/SPS"  # of all members of the process
NEVER = 1e30  # steps of a seed that does not get to a threshold
# Flags of two values that make no other setting: seeds, places, and how a policy is looked at
APART = {"seed", "num_seeds", "grid", "run_dir", "clobber", "mode", "deterministic", "use_best"}
APART |= {"eval_episodes", "eval_steps", "video", "render", "checkpoint_interval", "track"}


class Table(NamedTuple):
    header: list[str]
    rows: list[list[str]]


# --- Run folders ---
def read(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {name: (steps, values)} of the scalars of one member's event files."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 1}).Reload()
    found = {}
    for tag in reader.Tags()["scalars"]:
        events = reader.Scalars(tag)
        steps = np.array([event.step for event in events], float)
        found[tag] = (steps, np.array([event.value for event in events]))
    return found


def curves(folders: list[Path], members: int, points: int) -> dict[str, list]:
    """Returns the curves of some members of a process.

    Args:
        members: of the process.

    Returns: `steps` [P], `returns` and `lengths` [S, P], and `seconds` [P] since the first step,
        without compilation and pauses; nothing where no episode has ended.
    """
    scalars = [read(folder) for folder in folders]
    if not all(RETURN in found for found in scalars):
        return {}
    first = max(found[RETURN][0][0] for found in scalars)
    last = min(found[RETURN][0][-1] for found in scalars)
    grid = np.linspace(first, last, min(points, len(scalars[0][RETURN][0])))
    content = {"steps": grid.tolist()}
    for key, tag in (("returns", RETURN), ("lengths", LENGTH)):
        content[key] = [significant(np.interp(grid, *found[tag])) for found in scalars]
    steps, speeds = scalars[0][SPEED]  # of all members
    speeds = np.concatenate([[np.median(speeds)], speeds[1:]])  # the first had to compile
    spent = np.cumsum(members * np.diff(steps, prepend=0) / speeds)
    return content | {"seconds": significant(np.interp(grid, steps, spent))}


def significant(values: Iterable[float], digits: int = 5) -> list[float]:
    """Returns numbers with that many digits, for files and pages that are not too large."""
    return [float(f"{value:.{digits}g}") for value in values]


def defaults_of(script: Path) -> dict:
    """Returns the defaults of a script's flags, from its text, if that is there."""
    if not script.exists():
        return {}
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            fields = [line for line in node.body if isinstance(line, ast.AnnAssign) and line.value]
            return {line.target.id: literal(line.value) for line in fields}
    return {}


def literal(node: ast.expr) -> object:
    """Returns a default as args.json has it, or None of an expression that is no literal."""
    text = ast.unparse(node)
    try:
        value = "Infinity" if text == "math.inf" else ast.literal_eval(text)
    except ValueError:
        return None
    return list(value) if isinstance(value, tuple) else value


def flag(name: str, value: object) -> str:
    """Returns a setting as it stands in a command."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    words = value if isinstance(value, list) else ["inf" if value == "Infinity" else value]
    return " ".join([f"--{dashed}", *(shlex.quote(str(word)) for word in words)])


def command_of(script: Path, args: dict) -> str:
    """Returns the command that makes a run, with the flags that are not the script's defaults."""
    defaults = defaults_of(script)
    left_out = {"run_dir", "clobber", "mode"}
    flags = [
        flag(name, value)
        for name, value in args.items()
        if name not in left_out and value != defaults.get(name)
    ]
    return " ".join(["python", script.name, *flags])


def member_folder(folder: Path, member: dict, alone: bool) -> Path:
    """Returns the place of a member's event files in a run folder."""
    if alone:
        return folder
    settings = [f"{key}={value}" for key, value in member.items() if key != "seed"]
    return folder / ",".join([*settings, f"seed{member['seed']}"])


def entries_of(folder: Path, points: int = 200) -> list[dict]:
    """Returns the entries of a run folder, one for each point of its grid."""
    result = json.loads((folder / "result.json").read_text())
    members = result.get("members") or [{"seed": seed} for seed in result["seeds"]]
    groups = {}
    for i, member in enumerate(members):
        settings = {key: value for key, value in member.items() if key != "seed"}
        groups.setdefault(json.dumps(settings), (settings, []))[1].append(i)
    args = {key: value for key, value in result["args"].items() if key != "run_dir"}
    stopped_at = None if result["finished"] else result["timesteps"]
    shared = {"script": result["script"], "env_id": result["env_id"], "args": args}
    kept = ("timesteps", "finished", "sps", "wall_time", "compile_time", "versions", "device")
    shared |= {key: result[key] for key in kept} | {"stopped_at": stopped_at}
    shared |= {"members": len(members), "command": command_of(folder / result["script"], args)}
    entries = []
    for settings, chosen in groups.values():
        folders = [member_folder(folder, members[i], len(members) == 1) for i in chosen]
        entry = {"name": named(shared, settings), "settings": settings}
        entry["seeds"] = [members[i]["seed"] for i in chosen]
        for key in ("episodic_return", "eval_return", "solved_at"):
            entry[key] = picked(result, key, chosen)
        entries.append(entry | shared | curves(folders, len(members), points))
    return entries


def named(shared: dict, settings: dict) -> str:
    """Returns an entry's name: its environment, its experiment, its place in a grid."""
    name = [shared["env_id"], shared["args"]["exp_name"]]
    name += [f"{key}={value:g}" for key, value in settings.items()]
    if shared["stopped_at"] is not None:
        name.append(f"stopped at {count(shared['stopped_at'])}")
    return " ".join(name)


def picked(result: dict, key: str, chosen: list[int]) -> list | None:
    """Returns what a result has for some of its members, or None where it has nothing."""
    values = result.get(key)
    return [values[i] for i in chosen] if values else None


def setting_of(entry: dict) -> str:
    """Returns what two entries have in common that are seeds of one setting."""
    args = {key: value for key, value in entry["args"].items() if key not in APART}
    told = [entry["script"], entry["settings"], args, entry["stopped_at"]]
    return json.dumps(told, sort_keys=True)


def joined(entries: list[dict]) -> dict:
    """Returns the entry of all seeds of entries of one setting, of which each has its own."""
    if len(entries) == 1:
        return entries[0]
    whole = dict(entries[0])
    for key in ("seeds", "episodic_return", "eval_return", "solved_at"):
        if all(entry[key] for entry in entries):
            whole[key] = [value for entry in entries for value in entry[key]]
        else:
            whole[key] = None
    drawn = [entry for entry in entries if "steps" in entry]
    if drawn:
        first = max(entry["steps"][0] for entry in drawn)
        last = min(entry["steps"][-1] for entry in drawn)
        grid = np.linspace(first, last, min(len(entry["steps"]) for entry in drawn))
        whole["steps"] = grid.tolist()
        for key in ("returns", "lengths"):
            rows = [(entry["steps"], row) for entry in drawn for row in entry[key]]
            whole[key] = [significant(np.interp(grid, *row)) for row in rows]
        seconds = [np.interp(grid, entry["steps"], entry["seconds"]) for entry in drawn]
        whole["seconds"] = significant(np.mean(seconds, axis=0))
    return whole


def collect(paths: Iterable[Path]) -> list[dict]:
    """Returns the entries of all run folders in and below paths, seeds of a setting together."""
    found = {file.parent for path in paths for file in path.rglob("result.json")}
    groups = {}
    for folder in sorted(found):
        if ".old-" not in str(folder):
            for entry in entries_of(folder):
                group = groups.setdefault(setting_of(entry), [])
                if not any(set(entry["seeds"]) & set(other["seeds"]) for other in group):
                    group.append(entry)
    return [joined(entries) for entries in groups.values()]


# --- Results ---
def entries_in(content: object, name: str = "") -> list[dict]:
    """Returns the entries that a result file's content has, at whatever depth."""
    if isinstance(content, list):
        return [entry for item in content for entry in entries_in(item)]
    if not isinstance(content, dict):
        return []
    trained = "args" in content and "episodic_return" in content
    if trained or "steps" in content:
        env_id = content.get("env_id") or content.get("args", {}).get("env_id")
        return [{"name": name, **content, "env_id": env_id}] if env_id else []
    found = [entry for key, item in content.items() for entry in entries_in(item, key)]
    for key, item in content.items():
        if found and isinstance(item, list) and item and isinstance(item[0], float):  # a peer's
            env_id = found[-1]["env_id"]
            found.append({"name": f"{env_id} {key}", "env_id": env_id, "episodic_return": item})
    return found


def load(name: str) -> object:
    """Returns the content of a file of benchmarks/results/."""
    return json.loads((HERE / f"results/{name}.json").read_text())


def label_of(entry: dict) -> str:
    """Returns an entry's name without its environment's."""
    return entry["name"].removeprefix(entry["env_id"]).strip() or entry["name"]


def label_all(entries: list[dict]) -> list[str]:
    """Returns the names of an environment's entries, with the flags that tell equal ones apart."""
    names = [label_of(entry) for entry in entries]
    said = []
    for name, entry in zip(names, entries, strict=True):
        same = [other for other, twin in zip(entries, names, strict=True) if twin == name]
        said.append(" ".join([name, *differing(entry, same)]))
    return said


def differing(entry: dict, others: list[dict]) -> list[str]:
    """Returns the settings of an entry that are not the same in all of some entries."""
    settings = [{"script": other.get("script"), **other.get("args", {})} for other in others]
    own = {"script": entry.get("script"), **entry.get("args", {})}
    return [
        str(value) if key == "script" else flag(key, value)
        for key, value in own.items()
        if key not in APART and any(other.get(key) != value for other in settings)
    ]


def short(env_id: str) -> str:
    """Returns an environment's id without the module that has it."""
    return env_id.split(":")[-1]


def panels(entries: list[dict]) -> dict[str, list[dict]]:
    """Returns the entries of each environment, or of each scenario of it."""
    found = {}
    for entry in entries:
        scenario = entry.get("args", {}).get("scenario", "")
        found.setdefault(f"{short(entry['env_id'])} {scenario}".strip(), []).append(entry)
    return found


def scores_of(entry: dict) -> np.ndarray:
    """Returns the seeds' mean returns of their last 100 training episodes [S]."""
    values = entry.get("episodic_return")
    if values is None:
        return np.array(entry["returns"])[:, -1]
    return np.array([np.nan if value is None else value for value in values], float)


def played_of(entry: dict) -> np.ndarray:
    """Returns the seeds' mean returns in evaluation [S], or nothing."""
    values = entry.get("eval_return") or []
    means = [value["mean"] if isinstance(value, dict) else value for value in values]
    return np.array([value for value in means if value is not None], float)


def own_figures_of(entry: dict) -> np.ndarray:
    """Returns the seeds' means in evaluation of the task's own figure, battles won [S], or none."""
    values = entry.get("eval_return") or []
    return np.array([x["measure"] for x in values if isinstance(x, dict) and "measure" in x], float)


def published_of(entry: dict) -> list[dict]:
    """Returns the sources in references.toml that have a figure for an entry's environment."""
    scenario = entry.get("args", {}).get("scenario", "")
    env_id = short(entry["env_id"])
    return [
        source | {"env_id": env_id, "figure": source["figures"][env_id]}
        for source in REFERENCES["source"]
        if env_id in source["figures"] and source.get("scenario", scenario) == scenario
    ]


def published_for(entry: dict) -> list[dict]:
    """Returns those of them that had an entry's number of steps."""
    budget = entry.get("args", {}).get("total_timesteps", 0)
    sources = published_of(entry)
    return [source for source in sources if abs(source["steps"] - budget) <= 0.1 * budget]


# --- Statistics ---
def middle(scores: np.ndarray, axis: int = 0) -> np.ndarray:
    """Returns the interquartile mean."""
    return trim_mean(scores, 0.25, axis=axis)


def interval(scores: np.ndarray, statistic: Callable) -> np.ndarray:
    """Returns the 95 % bootstrap interval of a statistic over seeds [S, ...]: [2, ...].

    An environment is a stratum of its own, so its seeds are drawn from all of its seeds.
    """
    if len(scores) == 1:
        return np.stack([scores[0], scores[0]])
    given = {"axis": 0, "n_resamples": 1000, "method": "percentile", "rng": 0}
    found = bootstrap((scores,), statistic, vectorized=True, **given).confidence_interval
    return np.stack([found.low, found.high])


# --- Tables ---
def decimals(x: float) -> int:
    """Returns how many decimals show three digits of a number, about."""
    size = abs(x)
    return 0 if size >= 100 else 1 if size >= 10 else 2


def figure(x: float, like: float | None = None) -> str:
    """Returns a number with about three digits, or with as many decimals as another one has."""
    if not np.isfinite(x):
        return "none"
    return f"{x:.{decimals(x if like is None else like)}f}"


def plain(x: object) -> str:
    """Returns a measured number as it is."""
    if not isinstance(x, float):
        return str(x)
    return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def count(x: float) -> str:
    """Returns a number of steps, such as 250k."""
    if x >= 1e6:
        return f"{x / 1e6:.3g}M"
    return f"{x / 1e3:.3g}k" if x >= 1e3 else f"{x:.3g}"


def spread(scores: np.ndarray) -> str:
    """Returns the mean and the standard deviation over seeds."""
    if len(scores) == 0:
        return ""
    mean = scores.mean()
    return f"{figure(mean)} ± {figure(scores.std(), mean)}" if len(scores) > 1 else figure(mean)


def bounds(scores: np.ndarray, statistic: Callable) -> str:
    """Returns the 95 % interval of a statistic over seeds, where there are several."""
    if len(scores) == 1:
        return ""
    low, high = interval(scores, statistic)
    like = statistic(scores, axis=0)
    return f" [{figure(low, like)}, {figure(high, like)}]"


def bounded(scores: np.ndarray, statistic: Callable = np.mean) -> str:
    """Returns a statistic over seeds and its 95 % interval."""
    return figure(statistic(scores, axis=0)) + bounds(scores, statistic)


def bar_of(entry: dict) -> str:
    """Returns an entry's bar and the steps after which its slowest seed had reached it."""
    if "steps_to_bar" not in entry:
        return ""
    reached = [steps for steps in entry["steps_to_bar"] if steps is not None]
    said = f"{entry['bar']:g}: {count(max(reached))}" if reached else f"{entry['bar']:g}: never"
    missing = len(entry["steps_to_bar"]) - len(reached)
    return f"{said}; {missing} of {len(entry['seeds'])} never" if reached and missing else said


def published(source: dict) -> str:
    """Returns a published figure with what was said of its spread."""
    match source["figure"]:
        case [mean, deviation]:
            return f"{mean:g} ± {deviation:g}"
        case [mean, low, high]:
            return f"{mean:g} [{low:g}, {high:g}]"
        case [mean]:
            return f"{mean:g}"


def best_published(entry: dict) -> str:
    """Returns the highest figure that was published for an entry's environment and steps."""
    sources = published_for(entry)
    if not sources:
        return ""
    best = max(sources, key=lambda source: source["figure"][0])
    return f"{published(best)} ({best['name']})"


def seeds_of(entry: dict) -> str:
    """Returns how many seeds an entry has, and the steps of each."""
    steps = entry.get("stopped_at") or entry.get("args", {}).get("total_timesteps")
    number = len(scores_of(entry))
    return f"{number} x {count(steps)}" if steps else str(number)


def without_empty(table: Table) -> Table:
    """Returns a table without the columns that are empty."""
    kept = [i for i in range(len(table.header)) if any(row[i] for row in table.rows)]
    rows = [[row[i] for i in kept] for row in table.rows]
    return Table([table.header[i] for i in kept], rows)


def scores(entries: list[dict]) -> Table:
    """Returns what entries reached, a row each."""
    rows = []
    labels = {}
    for group in panels(entries).values():
        labels.update(zip(map(id, group), label_all(group), strict=True))
    for entry in entries:
        trained = scores_of(entry)
        played = played_of(entry)
        own = own_figures_of(entry)
        rows.append(
            [
                short(entry["env_id"]),
                labels[id(entry)],
                entry.get("flags", ""),
                seeds_of(entry),
                spread(trained) + bounds(trained, np.mean),
                bounded(trained, middle) if len(trained) > 2 else "",
                spread(played) + bounds(played, np.mean) if len(played) else "",
                figure(played.min()) if len(played) > 1 else "",
                bounded(own) if len(own) else "",
                bar_of(entry),
                best_published(entry),
            ]
        )
    header = ["environment", "settings", "flags", "seeds x steps", "training: mean ± std [95 %]"]
    header += ["training: IQM [95 %]", "played: mean ± std [95 %]", "lowest seed played"]
    header += ["won, eaten [95 %]", "bar: slowest seed's steps", "published"]
    return without_empty(Table(header, rows))


def threshold_of(entry: dict) -> tuple[float | None, str]:
    """Returns the return at which clocks stop, and whose it is."""
    solved = REFERENCES["solved"].get(short(entry["env_id"]).removeprefix("gymnax/"))
    if solved is not None:
        return solved, "solved"
    if "bar" in entry:
        return entry["bar"], "bar"
    sources = published_for(entry)
    if sources:
        best = max(sources, key=lambda source: source["figure"][0])
        return best["figure"][0], best["name"]
    return None, ""


def reached(entry: dict, threshold: float, why: str) -> np.ndarray:
    """Returns the steps after which each seed had reached a threshold, or NEVER [S]."""
    if why == "solved" and entry.get("solved_at"):
        return np.array([NEVER if steps is None else steps for steps in entry["solved_at"]])
    above = np.array(entry["returns"]) >= threshold
    first = np.array(entry["steps"])[above.argmax(axis=1)]
    return np.where(above.any(axis=1), first, NEVER)


def within(values: np.ndarray) -> str:
    """Returns an IQM of steps or seconds and its interval; seeds that never arrive are beyond."""
    low, high = interval(values, middle)
    numbers = (middle(values), low, high)
    said = ["never" if x > NEVER / 1e6 else count(x) for x in numbers]
    return said[0] if len(set(said)) == 1 else f"{said[0]} [{said[1]}, {said[2]}]"


def thresholds(entries: list[dict]) -> Table:
    """Returns the steps and seconds to thresholds, a row an entry."""
    rows = []
    for title, group in panels([entry for entry in entries if entry.get("steps")]).items():
        for entry, label in zip(group, label_all(group), strict=True):
            value, why = threshold_of(entry)
            if value is None:
                continue
            steps = reached(entry, value, why)
            done = steps < NEVER
            row = [title, label, f"{value:g} ({why})", f"{done.sum()} of {len(steps)}"]
            seconds = ""
            if entry.get("seconds"):
                spent = np.interp(steps, entry["steps"], entry["seconds"])
                seconds = within(np.where(done, spent, NEVER))
            rows.append([*row, within(steps), seconds])
    header = ["environment", "settings", "threshold", "seeds that reached it"]
    return without_empty(Table([*header, "steps: IQM [95 %]", "seconds: IQM [95 %]"], rows))


def pivot(entries: list[dict], *ratio: str) -> Table:
    """Returns training returns, a row an environment and a column a setting.

    Args:
        ratio: none, or the two settings of which the last column has the ratio.
    """
    labels = list(dict.fromkeys(label_of(entry) for entry in entries))
    rows = []
    for env_id in dict.fromkeys(entry["env_id"] for entry in entries):
        found = {label_of(x): scores_of(x) for x in entries if x["env_id"] == env_id}
        row = [short(env_id)]
        for label in labels:
            seen = found.get(label, np.array([]))
            row.append(spread(seen) + bounds(seen, np.mean) if len(seen) else "")
        if ratio and set(ratio) <= found.keys():
            row.append(figure(found[ratio[0]].mean() / found[ratio[1]].mean()))
        rows.append(row)
    last = [" / ".join(ratio)] if ratio else []
    return Table(["mean ± std [95 %]", *labels, *last], rows)


def beside(files: list[list[dict]], labels: list[str]) -> Table:
    """Returns the training and evaluation returns of several files' entries side by side."""
    rows = []
    for entry in files[0]:
        env_id = entry["env_id"]
        row = [short(env_id)]
        for entries in files:
            same = [other for other in entries if other["env_id"] == env_id]
            row += [spread(scores_of(same[0])), spread(played_of(same[0]))] if same else ["", ""]
        rows.append([*row, best_published(entry)])
    header = [f"{label}: {what}" for label in labels for what in ("training", "played")]
    return Table(["environment", *header, "published"], rows)


def at(entries: list[dict], *steps: str) -> Table:
    """Returns the mean return around steps of the curves, and each of a few seeds' own."""
    rows = []
    for entry in entries:
        here = np.array(entry["steps"])
        returns = np.array(entry["returns"])
        row = [short(entry["env_id"]), label_of(entry)]
        for step in map(float, steps):
            near = np.abs(here - step) <= max(here[1] - here[0], 0.02 * step)
            means = returns[:, near].mean(axis=1) if near.any() else []
            row.append(each(means) if near.any() else "not reached")
        rows.append(row)
    return Table(["environment", "settings", *(count(float(step)) for step in steps)], rows)


def each(values: np.ndarray) -> str:
    """Returns a mean, and behind it what it is of."""
    if len(values) == 1:
        return figure(values[0])
    return f"{figure(values.mean())} ({', '.join(map(figure, values))})"


def ranking(content: dict) -> Table:
    """Returns the settings of benchmarks/results/defaults.json, the best first."""
    low = {task: np.mean(values) for task, values in content["untrained"]["returns"].items()}
    tasks = [task for task in low if task in REFERENCES["bar"]]
    rows = []
    ranked = sorted(content.items(), key=lambda item: -item[1].get("iqm", [-1])[0])
    for name, entry in ranked:
        means = {task: np.mean(values) for task, values in entry["returns"].items()}
        normal = {
            task: (means[task] - low[task]) / (REFERENCES["bar"][task] - low[task])
            for task in tasks
            if task in means
        }
        worst = min(normal, key=normal.get, default="")
        whole = "iqm" in entry
        found = "{:.3f} [{:.3f}, {:.3f}]".format(*entry["iqm"]) if whole else ""
        row = [name, found, f"{normal[worst]:.2f} {worst}" if whole else ""]
        others = [f"{task} {figure(mean)}" for task, mean in means.items() if task not in tasks]
        row += [figure(means[task]) if task in means else "" for task in tasks]
        rows.append([*row, ", ".join(others)])
    return Table(["setting", "IQM [95 %]", "worst task", *map(short, tasks), "others"], rows)


def flat(content: object) -> Table:
    """Returns every number of a content, with the names that lead to it."""
    return Table(["measured", "value"], leaves(content, ()))


def leaves(content: object, path: tuple[str, ...]) -> list[list[str]]:
    """Returns the rows of a content's numbers, but for what says where they are from."""
    if isinstance(content, dict) and {"mean", "std"} <= content.keys():
        return [[", ".join(path), said_of(content)]]
    if isinstance(content, dict):
        hidden = {"versions", "device", "seeds", "finished", "command", "commands", "args"}
        items = [(key, value) for key, value in content.items() if key not in hidden]
        return [row for key, value in items for row in leaves(value, (*path, key))]
    values = content if isinstance(content, list) else [content]
    if all(isinstance(item, dict) and "mean" in item for item in values):
        return [[", ".join(path), "; ".join(map(said_of, values))]]
    if any(isinstance(item, dict | list) for item in values):
        return [row for item in values for row in leaves(item, path)]
    said = [plain(value) for value in values if value is not None]
    return [[", ".join(path), ", ".join(said)]] if said else []


def said_of(played: dict) -> str:
    """Returns what an evaluation's result says."""
    return f"{figure(played['mean'])} ± {figure(played['std'], played['mean'])}"


def speeds(content: dict, *patterns: str) -> Table:
    """Returns a row for each comparison of benchmarks/results/speed.json.

    Args:
        patterns: of the comparisons' names; none: all.
    """
    rows = []
    for name, record in content.items():
        if patterns and not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            continue
        ours = np.array(record["ours"])
        peer = np.array(record["peer"])
        pairs = peer / ours if record["unit"] == "seconds" else ours / peer
        spread_of_pairs = f" ({pairs.min():.3g} to {pairs.max():.3g})" if len(pairs) > 1 else ""
        rows.append(
            [
                name,
                record["what"],
                f"{record['ratio']:.3g}{spread_of_pairs}",
                count(np.median(ours)),
                count(np.median(peer)),
                record["unit"],
                record.get("note", ""),
            ]
        )
    header = ["name", "what", "ratio of medians (pairs)", "ours", "the other", "unit", "note"]
    return without_empty(Table(header, rows))


def sources(entries: list[dict]) -> list[str]:
    """Returns the lines that say where entries ran, with which versions, by which commands."""
    said = [
        f"Ran on {entry['device']}; {versions_of(entry)}." for entry in entries if "device" in entry
    ]
    said += [f"`{entry['command']}`" for entry in entries if "command" in entry]
    return list(dict.fromkeys(said))


def versions_of(entry: dict) -> str:
    """Returns the versions that an entry was made with."""
    versions = entry.get("versions") or {}
    return ", ".join(f"{key} {value}" for key, value in versions.items()) or "versions not kept"


def published_table(entries: list[dict]) -> Table:
    """Returns what was published for entries' environments, a row a source, with its protocol."""
    rows = {}
    for source in (source for entry in entries for source in published_of(entry)):
        steps = count(source["steps"]) if source["steps"] else "not said"
        key = (source["name"], steps, source["protocol"])
        name = " ".join([source["env_id"], source.get("scenario", "")]).strip()
        rows.setdefault(key, {})[f"{name} {published(source)}"] = None
    said = [
        [name, steps, "; ".join(found), protocol] for (name, steps, protocol), found in rows.items()
    ]
    return Table(["source", "steps", "figures", "protocol"], said)


# --- README.md ---
ENTRY_KINDS = {"scores": scores, "thresholds": thresholds, "pivot": pivot, "at": at}
CONTENT_KINDS = {"ranking": ranking, "flat": flat, "speeds": speeds}
KINDS = {*ENTRY_KINDS, *CONTENT_KINDS, "beside"}


def markdown(table: Table) -> str:
    """Returns a table in Markdown."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join("| " + " | ".join(x.replace("|", "\\|") for x in row) + " |" for row in lines)


def folded(title: str, text: str) -> str:
    """Returns Markdown that a reader has to open."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def table_of(words: list[str]) -> tuple[Table, list[dict]]:
    """Returns the table that a line of remarks asks for, and its entries.

    Args:
        words: files of benchmarks/results/, how they are shown, and what that needs to know.
    """
    place = next(i for i, word in enumerate(words) if word in KINDS)
    contents = [load(name) for name in words[:place]]
    files = [entries_in(content) for content in contents]
    entries = [entry for found in files for entry in found]
    kind, *more = words[place:]
    if kind in ENTRY_KINDS:
        return ENTRY_KINDS[kind](entries, *more), entries
    if kind == "beside":
        return beside(files, more), entries
    table = CONTENT_KINDS[kind](contents[0], *more)
    return table, made(contents[0], table, more)


def made(content: dict, table: Table, names: list[str]) -> list[dict]:
    """Returns where a content's numbers, or the records that a table shows, are from."""
    if "device" in content:
        return [content]
    rows = {row[0] for row in table.rows}
    shown = {k: x for k, x in content.items() if k in rows and isinstance(x, dict)}
    found = [{k: x[k] for k in ("device", "versions") if k in x} for x in shown.values()]
    there = [name for name, record in shown.items() if "command" in record]
    asked = [pattern for pattern in names if fnmatch.filter(there, pattern)]
    if asked:
        found.append({"command": shlex.join(["python", "-m", "benchmarks.speed", *asked])})
    return found


def section(words: list[str]) -> str:
    """Returns the Markdown of a table, with where its figures are from, and what is published."""
    table, entries = table_of(words)
    parts = [markdown(table), "  \n".join(sources(entries))]
    others = published_table([entry for entry in entries if "env_id" in entry])
    if others.rows:
        parts.append(folded("Published figures and their protocols", markdown(others)))
    return "\n\n".join(part for part in parts if part)


def directive(line: str) -> list[str]:
    """Returns the words of a line of remarks that stands for a table, or none of another."""
    if not line.startswith("<!-- table: "):
        return []
    return shlex.split(line.removeprefix("<!-- table: ").removesuffix("-->"))


def remarks() -> list[str]:
    """Returns the lines of all remarks."""
    files = sorted((HERE / "remarks").glob("*.md"))
    return [line for file in files for line in ["", *file.read_text().splitlines()]][1:]


def directives() -> list[list[str]]:
    """Returns the words of all lines of remarks that stand for tables."""
    return [words for words in map(directive, remarks()) if words]


def readme() -> str:
    """Returns benchmarks/README.md: the remarks, with their tables, and results without remarks."""
    lines = [section(directive(line)) if directive(line) else line for line in remarks()]
    asked = {word for words in directives() for word in words}
    for path in sorted((HERE / "results").glob("*.json")):
        if path.stem not in asked and entries_in(load(path.stem)):
            lines += ["", f"## {path.stem}", "", section([path.stem, "scores"])]
    return "\n".join(lines) + "\n"
