"""Write one golden record per method: `python dev/golden.py [METHOD ...]`, or `make golden`.

Run it after adding a method, or after changing one on purpose; the diff shows what changed.
"""

import json
import sys
from pathlib import Path

from loralab.methods import all_methods
from loralab.testing import fingerprint

FOLDER = Path(__file__).parent.parent / "tests" / "methods" / "golden"


def main(names: list[str]) -> None:
    """Write the records of these methods, or of all."""
    for name in names or list(all_methods()):
        rows = [f'  "{key}": {json.dumps(value)}' for key, value in fingerprint(name).items()]
        (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
