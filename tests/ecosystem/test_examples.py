"""The example that needs transformers runs, and says what it should."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_language_model() -> None:
    code = "import sys, runpy; sys.modules['torchvision'] = None; sys.argv = ['language_model', '--quick']\n"
    code += "runpy.run_path('examples/language_model.py', run_name='__main__')"  # torchvision may be built for another
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\S+) +([\d.]+) bits a character, (\d+) non-zeros$", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["half-way", "dense", "expanded"]
    assert len({count for _, _, count in rows}) == 1
    assert all(float(spent) < 8 for _, spent, _ in rows)
