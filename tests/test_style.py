"""What holds of every script as a text: its rooms, its flags, and what scripts share."""

import ast
import builtins
import subprocess
import symtable
import tomllib
from itertools import combinations

import pytest
from conftest import ROOT, SCRIPTS
from sync import definitions, sync

EXCEPTIONS = tomllib.loads((ROOT / "tests/parity_exceptions.toml").read_text())
PAIRS = list(combinations(SCRIPTS, 2))
PYTHON = [*SCRIPTS, *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]
BANNERS = [
    "Settings",
    "State",
    "Networks",
    "Distribution",
    "Statistics",
    "Advantages and losses",
    "Update",
    "Environments",
    "Rollout",
    "Run",
]


def globals_read(text):
    """Returns the module-level names that a definition's text reads."""
    tables = [symtable.symtable(text, "<text>", "exec")]
    names = set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        top = table.get_type() == "module"
        names |= {s.get_name() for s in table.get_symbols() if s.is_global() or top}
    return {name for name in names if not hasattr(builtins, name)}


def exceptions(*paths):
    """Returns the names that may differ between these scripts."""
    sections = ["every_script", *(path.stem for path in paths)]
    return {name for section in sections for name in EXCEPTIONS.get(section, {})}


@pytest.mark.parametrize(("one", "two"), PAIRS, ids=lambda p: p.stem)
def test_shared_names_are_the_same_text_and_read_the_same_names(one, two):
    a, b = definitions(one), definitions(two)
    shared = sorted((a.keys() & b.keys()) - exceptions(one, two))
    assert len(shared) > 80
    assert not [name for name in shared if a[name] != b[name]]
    for name in shared:
        if not a[name].startswith("import "):
            read = globals_read(a[name]) - {name}
            assert not [x for x in read if (x in a) != (x in b)], name


@pytest.mark.parametrize(("one", "two"), PAIRS, ids=lambda p: p.stem)
def test_a_shared_flag_has_one_type_and_one_help_text(one, two):
    a, b = flags(one), flags(two)
    shared = (a.keys() & b.keys()) - EXCEPTIONS["flags"].keys()
    assert {name: a[name] for name in shared} == {name: b[name] for name in shared}


def test_no_stale_exception():
    """Each name of a section differs between that script and another that does not name it."""
    scripts = {path.stem: definitions(path) for path in SCRIPTS}
    for section, names in EXCEPTIONS.items():
        own = scripts.get(section)
        for name in names:
            among = [flags(path) for path in SCRIPTS] if section == "flags" else scripts.values()
            others = [found[name] for found in among if name in found]
            assert not own or name in own, f"{section}: {name} is gone"
            differ = [text for text in others if text != (own or {name: others[0]})[name]]
            assert differ, f"{section}: {name} no longer differs"


def flags(path):
    """Returns {flag: (type, help)}: of each field of Args, and the comment or string after it."""
    lines = path.read_text().splitlines()
    body = next(x.body for x in parsed(path).body if getattr(x, "name", "") == "Args")
    found = {}
    for node, below in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.AnnAssign):
            _, _, text = lines[node.end_lineno - 1][node.end_col_offset :].partition("# ")
            if isinstance(below, ast.Expr):
                text += ast.unparse(below)
            found[node.target.id] = (ast.unparse(node.annotation), text)
    return found


def parsed(path):
    return ast.parse(path.read_text())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_every_flag_is_read_and_explained(path):
    read = {node.attr for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)}
    schedule = definitions(path)["Schedule"]  # whose fields are read from Args by name
    assert not [x for x in flags(path) if x not in read and f"    {x}: " not in schedule]
    assert not [x for x, (_, text) in flags(path).items() if len(text) < 5]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_banners_stand_in_their_order(path):
    lines = path.read_text().splitlines()
    assert [line[6:-4] for line in lines if line.startswith("# --- ")] == BANNERS


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: p.stem)
def test_form(path):
    """Nothing is excused from the linter; functions do not nest, nor take handfuls of arguments."""
    assert "# no" + "qa" not in path.read_text()
    assert ast.get_docstring(parsed(path))
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            assert len(node.args.args) + len(node.args.kwonlyargs) <= 7, node.name
            inner = [x for x in ast.walk(node) if isinstance(x, ast.FunctionDef) and x is not node]
            deeper = [x for y in inner for x in ast.walk(y) if isinstance(x, ast.FunctionDef)]
            assert len(deeper) == len(inner), f"{node.name}: a def in a def in a def"
        if isinstance(node, ast.Assign):
            assert not isinstance(node.value, ast.Lambda), f"line {node.lineno}: give it a def"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_every_function_is_explained(path):
    for node in parsed(path).body:
        if isinstance(node, ast.FunctionDef):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_every_field_of_state_says_its_shape_or_meaning(path):
    """A comment stands behind each NamedTuple's name; arrays of odd shape have their own."""
    for node in parsed(path).body:
        if isinstance(node, ast.ClassDef) and ast.unparse(node.bases) == "NamedTuple":
            line = path.read_text().splitlines()[node.lineno - 1]
            assert "#" in line, node.name


def test_sync_copies_what_changed_in_one_script(tmp_path):
    def git(*args):
        who = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *who, *args], cwd=tmp_path, check=True)

    one, two = tmp_path / "ppo_a.py", tmp_path / "ppo_b.py"
    for path in (one, two):
        path.write_text("# why\ndef f(x):\n    return x\n\n\ndef g(x):\n    return f(x)\n")
    for args in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        git(*args)
    one.write_text(one.read_text().replace("return x", "return 2 * x").replace("why", "because"))
    assert "ppo_b.py" in sync(tmp_path, "f")
    assert one.read_text() == two.read_text()
    with pytest.raises(SystemExit):
        sync(tmp_path, "g")  # unchanged
    two.write_text(two.read_text().replace("2 * x", "3 * x"))
    with pytest.raises(SystemExit):
        sync(tmp_path, "f")  # both changed
    assert "3 * x" in two.read_text() and "2 * x" in one.read_text()
