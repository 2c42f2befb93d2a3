"""Puts this folder on the path, where the processes of `ranks` find that module too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
