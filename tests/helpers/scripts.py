"""The paths of the programs that users start."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "projects" / "SeMask" / "tools"
