"""Makes the demo's dataset: descriptions of the machine's own Debian package index, labelled with their archive section.

Usage: sections.py OUTPUT.csv

The choice depends on the index alone: duplicates go, descriptions found in several sections go, and where a section has
more than 400, those with the smallest hash stay.
"""

import csv
import hashlib
import os
import subprocess
import sys
import tempfile

SECTIONS = "admin database editors games graphics mail math net science sound video web".split()
AT_MOST = 400
AT_LEAST = 20


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    chosen = choose(read_index())
    write(chosen, sys.argv[1])
    counts = ", ".join(f"{section} {sum(label == section for _, label in chosen)}" for section in SECTIONS)
    print(f"{sys.argv[1]}: {len(chosen)} descriptions ({counts})")


def read_index() -> list[tuple[str, str]]:
    """(description, section) of every package; fetches the index where there is none yet."""
    found = parse(dump())
    if not found:
        root = [] if os.getuid() == 0 else ["sudo"]
        print("the package index is empty; running apt-get update", file=sys.stderr)
        subprocess.run([*root, "apt-get", "-qq", "update"], check=True)
        found = parse(dump())
    if not found:
        sys.exit("no package of the demo's sections is in this machine's index: it needs a Debian archive in its apt sources")
    return found


def dump() -> str:
    try:
        return subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, encoding="utf-8", errors="replace").stdout
    except FileNotFoundError:
        sys.exit("apt-cache is missing: the demo's data is Debian's package index, so it needs Debian")


def parse(text: str) -> list[tuple[str, str]]:
    found = []
    for paragraph in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and not line.startswith(" "))
        # Packages outside main say contrib/net.
        section = fields.get("Section", "").rsplit("/", 1)[-1]
        description = " ".join(fields.get("Description", "").split())
        if section in SECTIONS and description:
            found.append((description, section))
    return found


def choose(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Sorted (description, section), at most AT_MOST a section."""
    sections_of: dict[str, set[str]] = {}
    spelling: dict[str, str] = {}
    for description, section in sorted(found):
        key = description.lower()
        sections_of.setdefault(key, set()).add(section)
        spelling.setdefault(key, description)
    chosen = []
    for section in SECTIONS:
        mine = [spelling[key] for key, sections in sections_of.items() if sections == {section}]
        if len(mine) < AT_LEAST:
            sys.exit(f"only {len(mine)} descriptions of section {section} in this machine's index; is a full Debian archive in its apt sources?")
        mine.sort(key=lambda description: hashlib.sha256(description.encode()).digest())
        chosen += [(description, section) for description in mine[:AT_MOST]]
    return sorted(chosen)


def write(rows: list[tuple[str, str]], path: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(path) or ".", newline="", encoding="utf-8", delete=False) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["description", "section"])
        table.writerows(rows)
    os.replace(file.name, path)


if __name__ == "__main__":
    main()
