"""The drawing of layers under the roofs of memory and arithmetic."""

import xml.etree.ElementTree as ElementTree

import pytest

from fewbits.reports.roofline import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, roofline

_SVG = "{http://www.w3.org/2000/svg}"


def row(scale: float) -> dict:
    products = [{"vectors": n, "flops_per_byte": 4.0 * n, "flops": scale * n**0.5} for n in (1, 4, 16)]
    return {"shape": [8, 16], "terms": ["uniform", "a<b"], "products": products}


@pytest.mark.parametrize("bandwidth", [1e9, 1e11])
def test_every_product_is_a_dot_inside_the_frame_and_more_is_higher(bandwidth):
    drawn = ElementTree.fromstring(roofline([row(1e9), row(3e9)], 2e10, bandwidth))
    dots = [circle for circle in drawn.iter(f"{_SVG}circle") if len(circle)]
    places = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in dots]
    assert len(places) == 6 and all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in places)
    assert all(two[0] > one[0] and two[1] < one[1] for one, two in ((places[0], places[1]), (places[1], places[2])))
    assert places[3][1] < places[0][1]


def test_names_are_written_as_text():
    texts = [text.text for text in ElementTree.fromstring(roofline([row(1e9)], 2e10, 1e10)).iter(f"{_SVG}text")]
    assert "8 x 16: uniform + a<b" in texts
