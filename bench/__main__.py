"""``tox -e bench``; ``--help`` says what can be chosen."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Run as a folder, whose modules are not to shadow others. The checkout comes last: what is
# measured is what is installed.
sys.path[0] = str(ROOT / "tests")
sys.path.append(str(ROOT))

from bench.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
