"""The picture of a memory on the page of `deltamem serve`: its pixels are the states' colours."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers.browser import needs_chromium
from helpers.page_user import using

from deltamem_tool.memory.file import memory_from_bytes

pytestmark = [pytest.mark.server, pytest.mark.browser, pytest.mark.slow, needs_chromium]

TOLD = ("My dog is Rex.", "My dog is Bella.")


def pixels(user, number):
    """RGBA `[height, width, 4]` of a canvas."""
    height, width, values = user.page.evaluate(
        """number => {
            const canvas = document.querySelectorAll("canvas")[number];
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return [canvas.height, canvas.width, [...data]];
        }""",
        number,
    )
    return np.array(values).reshape(height, width, 4)


TWO_FRAMES = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"

COLOURS = {
    "light": ((33, 102, 172), (247, 247, 247), (178, 24, 43)),
    "dark": ((110, 178, 245), (32, 36, 43), (250, 128, 114)),
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_picture_shows_the_states_and_what_the_last_turn_changed(browser, server, scheme):
    with using(browser, server.url, color_scheme=scheme) as user:
        user.open(f"picture {scheme}")
        user.say(TOLD[0])
        first = memory_from_bytes(server.store.get("default", f"picture {scheme}").data, "first").states
        check_picture(user, [first, first], COLOURS[scheme])
        user.say(TOLD[1])
        second = memory_from_bytes(server.store.get("default", f"picture {scheme}").data, "second").states
        change = {layer: second[layer] - first[layer] for layer in first}
        check_picture(user, [second, change], COLOURS[scheme])
        other = "dark" if scheme == "light" else "light"
        user.page.emulate_media(color_scheme=other)
        user.page.evaluate(TWO_FRAMES)  # the page is notified before it draws a frame
        check_picture(user, [second, change], COLOURS[other])


def check_picture(user, columns, palette):
    """Check that each column has the states `[1, H, R, R]` of a layer in a canvas, with one pixel between heads."""
    negative, zero, positive = map(np.array, palette)
    for column, states in enumerate(columns):
        limit = max(np.abs(state).max() for state in states.values())
        for place, layer in enumerate(sorted(states)):
            number = len(states) * column + place
            shown = pixels(user, number)
            for head, state in enumerate(states[layer][0]):
                rank = len(state)
                share = state.astype(np.float64)[..., None] / limit
                colours = zero + np.abs(share) * (np.where(share < 0, negative, positive) - zero)
                part = shown[:rank, head * (rank + 1) : head * (rank + 1) + rank]
                assert np.abs(part[..., :3] - colours).max() <= 0.51  # rounded
            label = user.page.locator("canvas").nth(number).get_attribute("aria-label")
            norm = float(re.match(rf"layer {layer}, norm ([\d.e-]+),", label)[1])
            assert norm == pytest.approx(np.linalg.norm(states[layer]), rel=0.006)  # three digits
