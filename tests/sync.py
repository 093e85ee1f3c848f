"""Copies a shared definition from the script where it changed into the other scripts.

    python -m tests.sync NAME ...  # from the repository's root

Changed means: since the last commit. Where two have changed, nothing is written: exit code 2.
"""

import ast
import subprocess
import sys
from pathlib import Path


def definitions(path: Path) -> dict[str, str]:
    """Returns {name: text} of a script's top level, with decorators and the comments above."""
    source = path.read_text()
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", "")
            for alias in node.names:
                bound = (alias.asname or alias.name).split(".")[0]
                found[bound] = f"import {module}:{alias.name}"
            continue
        given = getattr(node, "targets", [getattr(node, "target", None)])
        targets = [x for target in given if target for x in ast.walk(target)]
        names = [x.id for x in targets if isinstance(x, ast.Name)]
        if hasattr(node, "name"):
            names.append(node.name)
        decorators = getattr(node, "decorator_list", [])
        first = min(node.lineno, *(x.lineno for x in [node, *decorators]))
        while is_comment(lines[first - 2]):
            first -= 1
        found |= dict.fromkeys(names, "\n".join(lines[first - 1 : node.end_lineno]))
    return found


def is_comment(line: str) -> bool:
    """Returns whether a line is a comment, but no banner."""
    return line.startswith("#") and not line.startswith("# ---")


def committed(path: Path) -> str:
    """Returns a script's text as of the last commit."""
    show = ["git", "show", f"HEAD:./{path.name}"]
    return subprocess.run(show, cwd=path.parent, capture_output=True, text=True).stdout


def sync(root: Path, name: str) -> str:
    """Returns what it did. Raises: SystemExit where not exactly one script has a new version."""
    texts = {path: definitions(path).get(name) for path in sorted(root.glob("ppo_*.py"))}
    texts = {path: text for path, text in texts.items() if text}
    changed = {text for path, text in texts.items() if text not in committed(path)}
    if len(changed) != 1:
        found = "several scripts, each in its own way," if changed else "nothing"
        line = f"{name}: since the last commit {found} changed: edit it in one script"
        print(line, file=sys.stderr)
        sys.exit(2)
    (new,) = changed
    behind = [path for path, text in texts.items() if text != new]
    for path in behind:
        path.write_text(path.read_text().replace(texts[path], new, 1))
    return f"{name}: copied into {', '.join(path.name for path in behind) or 'no other script'}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(sync(Path.cwd(), name))
