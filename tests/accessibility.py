"""axe-core on every page of some folders, in light and in dark: ``make accessibility``.

``python accessibility.py AXE FOLDER...``: the file axe.min.js, and folders of HTML. The exit status is 1 if axe finds
what it calls serious or critical. A local server sends the pages, so that their scripts run as they do for a reader.
"""

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCHEMES = ("dark", "light")
"""In the order of Chromium's own numbers."""
SERIOUS = ("serious", "critical")
RUNS = """
addEventListener('load', async () => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  const found = await axe.run(document, {resultTypes: ['violations']});
  const out = document.createElement('pre');
  out.id = 'axe-found';
  const dark = matchMedia('(prefers-color-scheme: dark)').matches;
  out.textContent = JSON.stringify({dark, passes: found.passes.length,
    violations: found.violations.map(v => ({id: v.id, impact: v.impact, help: v.help,
      nodes: v.nodes.map(n => n.target.join(' ') + ': ' + n.html.slice(0, 120))}))});
  document.body.appendChild(out);
});
"""


class Served(SimpleHTTPRequestHandler):
    """A folder's files, pages with axe-core in them."""

    def __init__(self, *args: object, axe: str, **kwargs: object) -> None:
        self.axe = axe
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Sends a file."""
        path = Path(self.translate_path(self.path))
        if path.suffix != ".html" or not path.is_file():
            return super().do_GET()
        script = f"<script>{self.axe}</script><script>{RUNS}</script></body>"
        sent = script.join(path.read_text().rsplit("</body>", 1)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)
        return None

    def log_message(self, *args: object) -> None:
        """Says nothing."""


def look(url: str, scheme: str) -> dict:
    """What axe finds on a page."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"),
            *("--no-first-run", f"--user-data-dir={folder}", "--window-size=1280,1000"),
            f"--blink-settings=preferredColorScheme={SCHEMES.index(scheme)}",
            *("--virtual-time-budget=60000", "--dump-dom", url),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = re.search(r'<pre id="axe-found">(.*?)</pre>', done.stdout, re.DOTALL)
    if said is None:
        sys.exit(f"{url}: axe-core did not run\n{done.stderr[-2000:]}")
    found = json.loads(html.unescape(said[1]))
    if not found["passes"] or found["dark"] != (scheme == "dark"):
        sys.exit(f"{url}: {found['passes']} rules pass, dark {found['dark']}, {scheme} was asked for")
    return found


def main(axe: Path, *folders: Path) -> None:
    """Looks at every page; prints what is wrong with each."""
    if CHROMIUM is None:
        sys.exit("no Chromium is installed")
    pages, serious = 0, 0
    for folder in folders:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Served, axe=axe.read_text(), directory=str(folder)))
        Thread(target=server.serve_forever, daemon=True).start()
        for page in sorted(folder.rglob("*.html")):
            for scheme in SCHEMES:
                url = f"http://127.0.0.1:{server.server_port}/{page.relative_to(folder)}"
                pages += 1
                for violation in look(url, scheme)["violations"]:
                    serious += violation["impact"] in SERIOUS
                    print(f"{page}, {scheme}: {violation['impact']}: {violation['id']}: {violation['help']}")
                    print(*(f"    {node}" for node in violation["nodes"][:5]), sep="\n")
        server.shutdown()
    print(f"{pages} looks at pages, {serious} serious violations")
    sys.exit(bool(serious))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
