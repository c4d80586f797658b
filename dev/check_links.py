"""Fail when a relative link in a tracked Markdown file leads nowhere.

A link to a heading (`#name`, also behind a file name) must name a heading of that file.
"""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\(\s*<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\s*\)|(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#+\s+(.+?)\s*#*$", re.MULTILINE)


def tracked(pattern: str, root: Path = ROOT) -> list[Path]:
    """Return the files that git tracks, or would track, and that match `pattern`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", pattern],
        cwd=root,
        capture_output=True,
        check=True,
    )
    names = [name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in sorted({root / name for name in names}) if path.is_file()]


def anchors(text: str) -> set[str]:
    """Return the anchors of a Markdown text's headings, spelled as GitHub spells them."""
    found = set()
    for title in HEADING.findall(FENCE.sub("", text)):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def broken_links(path: Path) -> list[str]:
    """Return "target" for each relative link in the file at `path` that leads nowhere."""
    text = path.read_text(encoding="utf-8")
    broken = []
    for match in LINK.finditer(CODE.sub("", FENCE.sub("", text))):
        target = match.group(1) or match.group(2)
        if re.match(r"[a-z][a-z0-9+.-]*:|//", target):
            continue
        name, _, anchor = target.partition("#")
        goal = path.parent / unquote(name) if name else path
        known = not anchor or goal.suffix != ".md" or not goal.is_file()
        if not goal.exists() or not (known or anchor in anchors(goal.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def main() -> int:
    """Print every broken link; return 1 if there is one."""
    files = tracked("*.md")
    broken = [(path, target) for path in files for target in broken_links(path)]
    for path, target in broken:
        print(f"{path.relative_to(ROOT)}: {target} does not exist", file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
