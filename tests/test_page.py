"""The report's page in a browser, where there is one: nothing is wider than the screen, everything can be read."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from fpe.bench.cli import cli

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
LEAST_CONTRAST = 4.5
"""WCAG 2.1, level AA, of text."""
LEAST_SIZE = 9
"""Pixels of text in a figure, on a phone too."""
LOOKS = """
const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const numbers = text => (text.match(/[\\d.]+/g) || []).map(Number);
const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
function behind(node) {
  for (; node; node = node.parentElement) {
    const c = numbers(getComputedStyle(node).backgroundColor);
    if (c.length === 3 || c[3] > 0.99) return c;
  }
  return [255, 255, 255];
}
const found = {overflow: [], faint: [], small: [], texts: 0};
document.querySelectorAll('details').forEach(d => d.open = true);
const wide = document.documentElement.clientWidth;
const whole = document.documentElement.scrollWidth;
if (whole > wide) found.overflow.push('the page ' + whole);
for (const node of document.querySelectorAll('body *')) {
  const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
  if (!own || ['STYLE', 'SCRIPT', 'style', 'title', 'defs'].includes(node.tagName)) continue;
  const style = getComputedStyle(node);
  if (node.getClientRects().length === 0) continue;
  found.texts++;
  const inPicture = node.closest('svg');
  if (inPicture) {
    const size = parseFloat(style.fontSize) * inPicture.getBoundingClientRect().width / inPicture.viewBox.baseVal.width;
    if (!(size >= LEAST_SIZE)) found.small.push(size.toFixed(1) + ' ' + node.textContent.trim().slice(0, 40));
  }
  if (inPicture && inPicture.querySelector('image, .on-colour')) continue;
  const a = light(numbers(inPicture ? style.fill : style.color)), b = light(behind(node));
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (!(contrast >= LEAST)) found.faint.push(contrast.toFixed(2) + ' ' + node.textContent.trim().slice(0, 40));
  if (!node.closest('.scroll, figure')) {
    const box = node.getBoundingClientRect();
    if (box.right > wide + 1) found.overflow.push(node.textContent.trim().slice(0, 40));
  }
}
const out = document.createElement('pre');
out.id = 'found'; out.textContent = JSON.stringify(found); document.body.appendChild(out);
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    done = CliRunner().invoke(cli, ["report", "--quick", "--output", str(folder)])
    assert done.exit_code == 0, done.output
    page = (folder / "report.html").read_text()
    script = LOOKS.replace("LEAST_SIZE", str(LEAST_SIZE)).replace("LEAST", str(LEAST_CONTRAST))
    (folder / "checked.html").write_text(page.replace("</body>", f"<script>{script}</script></body>"))
    frame = "<!doctype html><body style='margin:0'><iframe src='checked.html' width=WIDTH height=900></iframe>"
    frame += "<script>addEventListener('load', () => document.body.appendChild(document.querySelector('iframe')"
    frame += ".contentDocument.getElementById('found')))</script>"
    for width in (390, 1280):
        (folder / f"{width}.html").write_text(frame.replace("WIDTH", str(width)))
    return folder


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_the_page_fits_and_can_be_read(report: Path, tmp_path: Path, width: int, scheme: str) -> None:
    command = [
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"),
        *("--no-first-run", "--allow-file-access-from-files", f"--user-data-dir={tmp_path}"),
        f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}",
        *("--window-size=1400,1000", "--dump-dom", (report / f"{width}.html").as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert said is not None, done.stderr[-2000:]
    found = json.loads(html.unescape(said[1]))
    assert found["texts"] > 500 and found["overflow"] == found["faint"] == found["small"] == []
