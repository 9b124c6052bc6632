"""What a user does in a browser besides clicking: copying and pasting a picture."""

import base64
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys


COPY = """
const [address, done] = arguments;
fetch(address).then(answer => answer.blob())
    .then(png => navigator.clipboard.write([new ClipboardItem({ "image/png": png })])).then(() => done());
"""


def copy_picture(chromium: webdriver.Chrome, png: Path) -> None:
    """Copies a picture to the clipboard, which the page in the browser may then read."""
    chromium.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    chromium.execute_async_script(COPY, "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode())


def press_ctrl_v(chromium: webdriver.Chrome) -> None:
    ActionChains(chromium).key_down(Keys.CONTROL).send_keys("v").key_up(Keys.CONTROL).perform()
