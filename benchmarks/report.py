"""One page of all results, with curves to look at, and benchmarks/README.md.

    python -m benchmarks.report  # run folders below runs/, and benchmarks/results/: report.html
    python -m benchmarks.report runs/ppo_continuous/Hopper-v4 --out hopper.html
    python -m benchmarks.report --collect hopper runs/ppo_continuous/Hopper-v4 --picture

The page is one file that needs neither server nor network. Bands and brackets are 95 % bootstrap
intervals over seeds; where settings share environments, rliable compares them, with seeds drawn
anew within each environment (Agarwal et al. 2021, arXiv 2108.13264). --collect writes the entries
of run folders to benchmarks/results/NAME.json, --picture also their curves to NAME.png. README.md
is made of benchmarks/results/, references.toml and remarks/ alone: whoever runs this without new
results gets the same text.
"""

import base64
import gzip
import html
import itertools
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from numpy.random import mtrand
from plotly.offline import get_plotlyjs
from rliable import library, metrics

from benchmarks import tables
from benchmarks.tables import Table, scores_of

RESULTS = tables.HERE / "results"
POINTS = 100  # of a curve, on the page
TAUS = np.linspace(0, 1, 51)  # of a performance profile
MAX_COMPARED = 8  # settings


# --- Curves ---
def line(entry: dict, label: str) -> dict:
    """Returns a curve as the page draws it: places, and for a mean and an IQM value and bounds."""
    returns = np.array(entry["returns"])
    kept = np.unique(np.linspace(0, returns.shape[1] - 1, POINTS).astype(int))
    seconds = entry.get("seconds")
    content = {
        "label": label,
        "seeds": len(returns),
        "steps": tables.significant(np.array(entry["steps"])[kept]),
        "seconds": tables.significant(np.array(seconds)[kept]) if seconds else None,
    }
    for name, statistic in (("mean", np.mean), ("iqm", tables.middle)):
        low, high = tables.interval(returns[:, kept], statistic)
        drawn = (statistic(returns[:, kept], axis=0), low, high)
        content[name] = [tables.significant(values) for values in drawn]
    return content


def curve_plots(entries: list[dict]) -> dict[str, dict]:
    """Returns a plot of curves for each environment."""
    plots = {}
    for title, group in tables.panels([entry for entry in entries if entry.get("steps")]).items():
        lines = [line(*pair) for pair in zip(group, tables.label_all(group), strict=True)]
        value, why = tables.threshold_of(group[0])
        plots[title] = {"kind": "curves", "lines": lines, "threshold": value, "why": why}
    return plots


def draw(entries: list[dict], path: Path) -> None:
    """Draws the page's curves of means as a picture, a panel an environment."""
    plots = curve_plots(entries)
    size = (5 * len(plots), 4)
    figure, axes = plt.subplots(1, len(plots), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, plot) in zip(axes[0], plots.items(), strict=True):
        for curve in plot["lines"]:
            mean, low, high = curve["mean"]
            axis.plot(curve["steps"], mean, label=curve["label"])
            axis.fill_between(curve["steps"], low, high, alpha=0.2)
        axis.set(title=title, xlabel="steps", ylabel="return of the last 100 episodes")
    axes[0, 0].legend()
    figure.savefig(path, dpi=100)


# --- Costs ---
def costs(entries: list[dict]) -> Table:
    """Returns mean episode lengths and durations of an iteration, a row an entry."""
    rows = []
    for title, group in tables.panels([entry for entry in entries if entry.get("sps")]).items():
        for entry, label in zip(group, tables.label_all(group), strict=True):
            args = entry["args"]
            members = entry.get("members") or len(entry["seeds"])
            rollout = args.get("num_envs", 1) * args.get("num_steps", 1) * members
            last = -(-len(entry.get("steps", [])) // 10)  # the last tenth of a curve
            lengths = [np.mean(row[-last:]) for row in entry.get("lengths") or []]
            length = tables.bounded(np.array(lengths)) if lengths else ""
            row = [title, label, length, str(members), tables.count(rollout)]
            rows.append([*row, f"{rollout / entry['sps']:.3g} s", tables.count(entry["sps"])])
    header = ["environment", "settings", "mean length of the last episodes [95 %]"]
    header += ["members of the process", "their steps in an iteration", "duration of an iteration"]
    return tables.without_empty(Table([*header, "steps per second"], rows))


# --- Comparisons ---
def comparable(entries: list[dict]) -> dict[str, np.ndarray]:
    """Returns normalised scores [S, E] of the settings that share environments, if there are two.

    They are those of the environment with most settings, and all environments that these share. A
    score is 0 for the lowest seed that is compared on an environment, and 1 for the highest.
    """
    found = {}
    for title, group in tables.panels(
        [entry for entry in entries if len(scores_of(entry)) > 1]
    ).items():
        for entry, label in list(zip(group, tables.label_all(group), strict=True))[:MAX_COMPARED]:
            found.setdefault(title, {})[label] = scores_of(entry)
    if not found:
        return {}
    labels = list(max(found.values(), key=len))
    shared = [group for group in found.values() if set(labels) <= group.keys()]
    if len(labels) < 2:
        return {}
    columns = {label: [] for label in labels}
    for group in shared:
        compared = np.concatenate([group[label] for label in labels])
        width = np.ptp(compared) or 1
        for label in labels:
            columns[label].append((group[label] - compared.min()) / width)
    seeds = {label: min(map(len, scores)) for label, scores in columns.items()}
    return {
        label: np.stack([column[: seeds[label]] for column in scores], axis=1)
        for label, scores in columns.items()
    }


def aggregate(scores: np.ndarray) -> np.ndarray:
    """Returns the interquartile mean and the mean of scores [S, E]."""
    return np.array([metrics.aggregate_iqm(scores), metrics.aggregate_mean(scores)])


def improvement(mine: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the probability that a seed of ours is above one of others."""
    return np.array([metrics.probability_of_improvement(mine, others)])


def comparison_plots(scores: dict[str, np.ndarray]) -> dict[str, dict]:
    """Returns a performance profile and the probabilities of improvement."""
    mtrand.seed(0)  # rliable draws from NumPy's own stream
    profiles, bounds = library.create_performance_profile(scores, TAUS, reps=200)
    lines = [
        {
            "label": label,
            "seeds": len(scores[label]),
            "drawn": [profile.tolist(), *bounds[label].tolist()],
        }
        for label, profile in profiles.items()
    ]
    pairs = {
        f"{one} > {two}": [scores[one], scores[two]]
        for one, two in itertools.combinations(scores, 2)
    }
    means, spreads = library.get_interval_estimates(pairs, improvement, reps=100)
    rows = [
        {"label": pair, "drawn": [float(means[pair][0]), *spreads[pair][:, 0].tolist()]}
        for pair in pairs
    ]
    return {
        "Performance profile": {"kind": "profile", "taus": TAUS.tolist(), "lines": lines},
        "Probability of improvement": {"kind": "improvement", "rows": rows},
    }


def aggregates(scores: dict[str, np.ndarray]) -> Table:
    """Returns the settings' aggregate normalised scores."""
    mtrand.seed(0)
    means, bounds = library.get_interval_estimates(scores, aggregate, reps=1000)
    rows = []
    for label, pair in means.items():
        said = [
            f"{mean:.3f} [{low:.3f}, {high:.3f}]"
            for mean, low, high in zip(pair, *bounds[label], strict=True)
        ]
        seeds, envs = scores[label].shape
        rows.append([label, f"{seeds} x {envs}", *said])
    header = ["settings", "seeds x environments", "IQM [95 %]", "mean [95 %]"]
    return Table(header, rows)


# --- Page ---
def html_of(table: Table) -> str:
    """Returns a table in HTML, in a box that scrolls by itself where it is too wide."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table.rows
    )
    content = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{content}</table></div>'


def titled(title: str, table: Table, note: str = "") -> str:
    """Returns a table under its title, or nothing where it has no rows."""
    if not table.rows:
        return ""
    said = f"<p>{html.escape(note)}</p>" if note else ""
    return f"<h3>{html.escape(title)}</h3>{said}{html_of(table)}"


def places(plots: dict[str, dict], drawn: dict[str, dict]) -> str:
    """Returns the places of plots, which are added to those that the page draws."""
    found = []
    for title, plot in plots.items():
        key = f"plot{len(drawn)}"
        drawn[key] = plot
        text = html.escape(title)
        found.append(
            f'<figure><figcaption>{text}</figcaption><div class="plot" id="{key}"></div></figure>'
        )
    return f'<div class="plots">{"".join(found)}</div>' if found else ""


def suite(entries: list[dict], drawn: dict[str, dict]) -> str:
    """Returns the part of the page for entries that belong together."""
    said = tables.sources(entries)
    where = "".join(f"<p>{html.escape(x)}</p>" for x in said if not x.startswith("`"))
    commands = "\n".join(html.escape(x.strip("`")) for x in said if x.startswith("`"))
    where += (
        f"<details><summary>Commands</summary><pre>{commands}</pre></details>" if commands else ""
    )
    scores = comparable(entries)
    parts = [
        titled("Scores", tables.scores(entries)),
        f'<div class="sources">{where}</div>' if where else "",
        "<h3>Learning curves</h3>" + places(curve_plots(entries), drawn),
        titled(
            "Steps and seconds to a threshold",
            tables.thresholds(entries),
            "From the first step on, without compilation and pauses; seconds are those of the"
            " process, in which all of its members train side by side.",
        ),
        titled("Episode lengths and iterations", costs(entries)),
    ]
    if scores:
        note = (
            "Of training returns; an environment's lowest seed is 0, its highest 1. Environments"
            " are those that all of these settings have run on."
        )
        parts += [
            titled("Settings against each other", aggregates(scores), note),
            places(comparison_plots(scores), drawn),
        ]
    published = tables.published_table(entries)
    parts.append(titled("Published figures and their protocols", published))
    return "".join(parts)


def suites(paths: list[Path]) -> dict[str, list[dict]]:
    """Returns the entries of run folders and of result files, by where they are from."""
    found = {}
    for path in paths:
        runs = tables.collect([path]) if path.is_dir() else []
        if runs:
            found[f"{path}/"] = runs
        files = [path] if path.is_file() else sorted(path.glob("*.json"))
        for file in files:
            entries = tables.entries_in(json.loads(file.read_text()))
            if entries and file.name not in ("args.json", "result.json"):
                found[file.stem] = entries
    return found


def measurements() -> dict[str, Table]:
    """Returns the tables of results that are no scores, such as speeds."""
    found = {}
    for name, *words in tables.directives():
        for kind in tables.CONTENT_KINDS.keys() & set(words):
            found[name] = tables.CONTENT_KINDS[kind](tables.load(name))
    return dict(sorted(found.items()))


def page(paths: list[Path]) -> str:
    """Returns the page."""
    drawn = {}
    sections = []
    for title, entries in suites(paths).items():
        environments = len(tables.panels(entries))
        counted = f"{environments} environment{'s' if environments > 1 else ''}"
        sections.append((title, counted, suite(entries, drawn)))
    if RESULTS in [path.resolve() for path in paths]:
        for title, table in measurements().items():
            sections.append((title, "measurements", html_of(table)))
    text = [
        f'<details class="suite" id="{html.escape(title)}"{" open" if i == 0 else ""}>'
        f"<summary><h2>{html.escape(title)}</h2><span>{counted}</span></summary>{content}</details>"
        for i, (title, counted, content) in enumerate(sections)
    ]
    links = [f'<a href="#{html.escape(x)}">{html.escape(x)}</a>' for x, *_ in sections]
    plotly = base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
    content = (tables.HERE / "report.html").read_text()
    parts = {
        "LINKS": " ".join(links),
        "SECTIONS": "\n".join(text),
        "PLOTS": json.dumps(drawn).replace("</", "<\\/"),
        "PLOTLY": plotly,
    }
    for name, part in parts.items():
        content = content.replace(f"<!-- {name} -->", part)
    return content


def main(
    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"), Path("benchmarks/results")),
    out: Path = Path("report.html"),
    collect: str = "",
    picture: bool = False,
) -> None:
    """Writes the page and benchmarks/README.md, or collects run folders.

    Args:
        runs: run folders, folders of such, result files, or folders of such.
        out: the page.
        collect: a name; benchmarks/results/NAME.json is then written from run folders.
        picture: with a name, their curves are also drawn to NAME.png.
    """
    there = [path for path in runs if path.exists()]
    if collect:
        entries = tables.collect(there)
        if not entries:
            sys.exit(f"no run folders in {', '.join(map(str, runs))}")
        path = RESULTS / f"{collect}.json"
        path.write_text(json.dumps(entries) + "\n")
        print(f"{path}: {len(entries)} entries")
        if picture:
            draw(entries, path.with_suffix(".png"))
    else:
        content = page(there)
        if "<details" not in content:
            sys.exit(f"nothing to show in {', '.join(map(str, runs))}")
        out.write_text(content)
        print(out)
    if collect or RESULTS in [path.resolve() for path in there]:
        (tables.HERE / "README.md").write_text(tables.readme())
        print(tables.HERE / "README.md")


if __name__ == "__main__":
    tyro.cli(main)
