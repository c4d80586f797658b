"""Open a page in headless Chromium inside a frame of the wanted width, and ask it what it sees.

A headless window is never narrower than 500 pixels, so a phone is a frame of 390 in a wider window.
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=6000",
)
PROBE = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => errors.push("blocked " + event.blockedURI));
for (const name of ["error", "warn"]) console[name] = (...words) => errors.push(words.join(" "));
addEventListener("load", () => setTimeout(() => parent.postMessage(JSON.stringify({
  errors,
  width: innerWidth,
  scroll: document.documentElement.scrollWidth,
  resources: performance.getEntriesByType("resource").map((entry) => entry.name),
  plots: [...document.querySelectorAll(".plot")].map((plot) => ({
    box: plot.clientWidth, drawn: plot._fullLayout && plot._fullLayout.width,
    paths: plot.querySelectorAll(".scatterlayer path").length,
  })),
}), "*"), 1000));
</script>"""
FRAME = """<!doctype html><title>waiting</title><body style="margin:0">
<iframe id="page" style="border:0;width:{width}px;height:{height}px"></iframe>
<script>
addEventListener("message", (event) => {{ document.title = event.data; }});
document.getElementById("page").src = "{name}";
</script></body>"""


def look(page: Path, width: int, height: int, picture: Path, *flags: str) -> dict:
    """Return what a probing copy of `page` reports at this width, and write a screenshot."""
    probe = page.with_name(f"probe_{page.name}")
    probe.write_text(page.read_text("utf-8").replace("<head>", "<head>" + PROBE, 1), "utf-8")
    frame = page.with_name(f"frame_{width}.html")
    frame.write_text(FRAME.format(width=width, height=height, name=probe.name), "utf-8")
    size = f"--window-size={max(width, 500)},{height}"
    dom = _chromium(size, *flags, "--dump-dom", frame.as_uri())
    _chromium(size, *flags, f"--screenshot={picture}", frame.as_uri())
    title = dom.split("<title>", 1)[1].split("</title>", 1)[0]
    return json.loads(title.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


def _chromium(*arguments: str) -> str:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        run = subprocess.run(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    return run.stdout
