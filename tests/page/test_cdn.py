"""The page of `deltamem page --cdn` in a browser."""

from __future__ import annotations

import shutil

import pytest
from helpers.browser import needs_chromium
from helpers.hosting import hosting
from helpers.node import node_modules
from helpers.page_user import using
from helpers.web_library import SCRIPTS
from playwright.sync_api import expect

from deltamem_tool.page.build import make_page
from deltamem_tool.page.runtime import PACKAGES

pytestmark = [pytest.mark.browser, pytest.mark.node, pytest.mark.slow, needs_chromium]

TELL, ASK, NAME = "My dog is Rex.", "What is the name of my dog?", "Rex"


@pytest.fixture(scope="module")
def cdn_page(web_folder, tmp_path_factory):
    """The address of a page, and the folder that serves as its CDN."""
    root = tmp_path_factory.mktemp("cdn")
    packages = node_modules(SCRIPTS)
    for package in PACKAGES:
        path = root / "npm" / f"{package.name}@{package.version}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(packages / package.name)
    with hosting(root) as cdn:
        make_page(web_folder, root / "site", runtime=packages, webgpu=False, cdn=f"{cdn}/npm")
        with hosting(root / "site") as address:
            yield address, root / "npm", cdn


def test_packages_come_from_a_cdn_and_are_kept(browser, cdn_page):
    address, _, cdn = cdn_page
    asked = set()
    with using(browser, address) as user:
        user.page.on("request", lambda request: asked.add(request.url))
        user.open("olga")
        user.say(TELL)
        elsewhere = {url for url in asked if not url.startswith((address, "blob:"))}
        assert len(elsewhere) == 4 and all(url.startswith(f"{cdn}/npm/") for url in elsewhere)
        asked.clear()
        user.reload()
        assert NAME in user.say(ASK)
        assert not any(url.startswith(cdn) for url in asked)


def test_another_package_from_the_cdn_is_not_run(browser, cdn_page):
    address, npm, _ = cdn_page
    jinja = next(package for package in PACKAGES if package.name.endswith("jinja"))
    folder = npm / f"{jinja.name}@{jinja.version}"
    original = folder.resolve()
    folder.unlink()
    shutil.copytree(original, folder)
    script = folder / "dist" / "index.js"
    content = script.read_bytes()
    script.write_bytes(content.replace(b"class", b"CLASS", 1))
    with using(browser, address) as user:
        user.page.goto(address)
        user.sees("jinja.js is not the expected file. Its content has changed.")
        expect(user.page.locator("main")).to_be_hidden()
    shutil.rmtree(folder)
    folder.symlink_to(original)
