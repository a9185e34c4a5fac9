"""Where the programs are that a user starts."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "projects" / "SeMask" / "tools"
