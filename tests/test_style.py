"""What holds of every script as a text: flags, size, form, and that scripts agree on what they share."""

import ast
import builtins
import subprocess
import symtable
import tomllib
from itertools import combinations

import pytest
from conftest import ROOT, SCRIPTS, load

EXCEPTIONS = tomllib.loads((ROOT / "tests/parity_exceptions.toml").read_text())
PAIRS = list(combinations(SCRIPTS, 2))
# Lines of a script, and of its algorithm, State to Update. What scripts share is 470 lines; PPO-CMA adds three
# networks, history, action repeat, full covariance and an agent to drive by hand, and cannot keep the usual limits.
LIMITS = {"ppo_cma": (925, 340)}
BANNERS = (
    "Settings, State, Networks, Distribution, Statistics, Advantages and losses, Update, Environments, Rollout, Run"
)


def definitions(path):
    """Returns {name: text} of what a script binds at top level, with decorators and the comments above."""
    source = path.read_text()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", "")
            found |= {(a.asname or a.name).split(".")[0]: f"import {module}:{a.name}" for a in node.names}
            continue
        names = [getattr(node, "name", None)] if hasattr(node, "name") else []
        names += [n.id for t in getattr(node, "targets", []) for n in ast.walk(t) if isinstance(n, ast.Name)]
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        while first > 1 and lines[first - 2].startswith("#") and not lines[first - 2].startswith("# ---"):
            first -= 1
        found |= dict.fromkeys(names, "\n".join(lines[first - 1 : node.end_lineno]))
    return found


def globals_read(text):
    """Returns the module-level names that a definition's text reads."""
    tables, names = [symtable.symtable(text, "<text>", "exec")], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        names |= {s.get_name() for s in table.get_symbols() if s.is_global() or table.get_type() == "module"}
    return {n for n in names if not hasattr(builtins, n)}


@pytest.mark.parametrize(("one", "two"), PAIRS, ids=lambda p: p.stem)
def test_shared_names_are_the_same_text_and_read_the_same_names(one, two):
    a, b = definitions(one), definitions(two)
    shared = (a.keys() & b.keys()) - EXCEPTIONS.keys()
    assert not [n for n in sorted(shared) if a[n] != b[n]]
    for name in [n for n in shared if not a[n].startswith("import ")]:
        assert not [g for g in globals_read(a[name]) - {name} if (g in a) != (g in b)], name


@pytest.mark.parametrize(("one", "two"), PAIRS, ids=lambda p: p.stem)
def test_a_shared_flag_has_one_type_and_one_help_text(one, two):
    a, b = flags(one), flags(two)
    assert {n: a[n] for n in a.keys() & b.keys()} == {n: b[n] for n in a.keys() & b.keys()}


def test_no_stale_exception():
    for name in EXCEPTIONS:
        assert len({d[name] for d in map(definitions, SCRIPTS) if name in d}) > 1, f"{name} no longer differs"


def flags(path):
    """Returns {flag: (type, help text)}: the annotation and the comment behind each field of Args."""
    lines = path.read_text().splitlines()
    body = next(n.body for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    fields = [n for n in body if isinstance(n, ast.AnnAssign)]
    return {n.target.id: (ast.unparse(n.annotation), lines[n.end_lineno - 1].partition("  # ")[2]) for n in fields}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_every_flag_is_read_and_explained(path):
    read = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    assert not flags(path).keys() - read
    assert all(text for _, text in flags(path).values())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_form(path):
    """Banners in their order; every function explained; file, algorithm and functions within their limits."""
    source = path.read_text()
    lines = source.splitlines()
    banners = [x[6:-4] for x in lines if x.startswith("# --- ")]
    assert ", ".join(banners) == BANNERS
    most, most_algorithm = LIMITS.get(path.stem, (750, 280))
    assert len(lines) <= most
    assert lines.index("# --- Environments ---") - lines.index("# --- State ---") <= most_algorithm
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
            assert len(node.args.args) + len(node.args.kwonlyargs) <= 7, node.name
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name != "main":
            assert ast.get_docstring(node), node.name


def test_sync_copies_what_changed_in_one_script(tmp_path):
    from sync import sync

    git = lambda *a: subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *a], cwd=tmp_path, check=True)  # noqa: E731
    one, two = (tmp_path / f"ppo_{name}.py" for name in "ab")
    for path in (one, two):
        path.write_text("# why\ndef f(x):\n    return x\n\n\ndef g(x):\n    return f(x)\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        git(*command)
    one.write_text(one.read_text().replace("return x", "return 2 * x").replace("why", "because"))
    assert "ppo_b.py" in sync(tmp_path, "f")
    assert one.read_text() == two.read_text()
    with pytest.raises(SystemExit):
        sync(tmp_path, "g")  # unchanged
    two.write_text(two.read_text().replace("2 * x", "3 * x"))
    with pytest.raises(SystemExit):
        sync(tmp_path, "f")  # both changed
    assert "3 * x" in two.read_text() and "2 * x" in one.read_text()


def test_update_compiles_once():
    """Three iterations with annealing, one compilation."""
    import jax
    import numpy as np
    from checks import small_args, start

    ppo = load(ROOT / "ppo_continuous.py")
    args = small_args(ppo, anneal_clip=True)
    network, learner, transition, _ = start(ppo, args)
    single = lambda y: jax.device_put(np.asarray(y, np.float32 if y.dtype == np.float64 else y.dtype))  # noqa: E731
    learner, transition = jax.tree.map(single, (learner, transition))
    update = jax.jit(lambda a, b: ppo.update(a, b, network, args))
    seen = []
    for _ in range(3):
        learner, metrics = update(learner, transition)
        seen.append(float(metrics["charts/learning_rate"]))
    assert update._cache_size() == 1
    assert seen[0] > seen[1] > seen[2]
