"""Makes docs/images/chat_page.png: the chat page on the demo model, on a desk and on a phone. Needs playwright and
chromium, as `make test-clients` does. Run it as: python scripts/make_page_image.py
"""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "images" / "chat_page.png"
BEGINNINGS = (
    ("A little bird sat in a tall tree.", 1),
    ("Once upon a time, a fox wanted to see the sea.", 4),
    ("Lily found a red box in the garden.", 8),
)
DESK = {"viewport": {"width": 1100, "height": 680}, "device_scale_factor": 1.25, "color_scheme": "light"}
PHONE = {"viewport": {"width": 360, "height": 660}, "device_scale_factor": 1.25, "color_scheme": "dark"}


def shot(browser: Browser, url: str, options: dict[str, object], beginnings: tuple[tuple[str, int], ...]) -> str:
    """A conversation for each beginning and its seed; the last one is shown. As a data address."""
    page = browser.new_page(**options)  # type: ignore[arg-type]
    page.goto(url)
    page.wait_for_selector("#dot[data-status=ready]")
    for text, seed in beginnings:
        page.evaluate("document.getElementById('new').click()")
        page.click("#open-settings")
        page.get_by_label("Seed", exact=True).fill(str(seed))
        page.get_by_role("button", name="Done").click()
        page.fill("#box", text)
        page.press("#box", "Enter")
        page.wait_for_selector("#send:visible", timeout=60_000)
    page.evaluate("document.getElementById('scroll').scrollTop = 0")
    page.evaluate("document.getElementById('jump').hidden = true")
    page.mouse.move(0, 0)
    data = page.screenshot()
    page.close()
    return "data:image/png;base64," + base64.b64encode(data).decode()


def main() -> None:
    command = [sys.executable, "-m", "puna", "serve", "--model", "demo", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        url = next(found[1] for line in server.stderr if (found := re.search(r"ready on (\S+)/v1", line)))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            desk = shot(browser, url, DESK, BEGINNINGS)
            phone = shot(browser, url, PHONE, BEGINNINGS[:1])
            page = browser.new_page(viewport={"width": 1300, "height": 690}, device_scale_factor=1.25)
            page.set_content(
                f"""<style>
                    body {{ margin: 0; }}
                    img {{ position: absolute; border-radius: 10px; box-shadow: 0 2px 14px #0004; }}
                    #desk {{ left: 16px; top: 12px; width: 1024px; }}
                    #phone {{ right: 16px; bottom: 12px; width: 270px; }}
                    #phone {{ border: 5px solid #2c2a27; border-radius: 22px; }}
                </style><img id="desk" src="{desk}"><img id="phone" src="{phone}">"""
            )
            page.screenshot(path=OUTPUT, omit_background=True)
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
