"""Copies a shared definition from the script where it changed since the last commit into the other scripts.

python -m tests.sync NAME ...  # from the repository's root; exit code 2, and nothing written, where two changed
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from test_style import definitions


def committed(path: Path) -> str:
    shown = subprocess.run(["git", "show", f"HEAD:./{path.name}"], cwd=path.parent, capture_output=True, text=True)
    return shown.stdout


def sync(root: Path, name: str) -> str:
    """Returns what it did. Raises: SystemExit where no script or several scripts hold a change of their own."""
    now = {p: definitions(p).get(name) for p in sorted(root.glob("ppo_*.py"))}
    now = {p: text for p, text in now.items() if text}
    texts = {text for path, text in now.items() if text not in committed(path)}
    if len(texts) != 1:
        found = "nothing" if not texts else "several scripts, each in its own way"
        print(f"{name}: since the last commit {found} changed: edit it in one script", file=sys.stderr)
        sys.exit(2)
    (new,) = texts
    behind = [path for path, text in now.items() if text != new]
    for path in behind:
        path.write_text(path.read_text().replace(now[path], new, 1))
    return f"{name}: copied into {', '.join(p.name for p in behind) or 'no other script'}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(sync(Path.cwd(), name))
