import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_measured_size_is_a_dot_and_more_bits_lie_further_right():
    module = runpy.run_path(str(ROOT / "scripts" / "plot_sizes.py"))
    series = {"bitstack": [(2.0, 40.0), (3.0, 25.0), (6.0, 19.0)], "gptq": [(2.5, 30.0)]}
    drawn = ElementTree.fromstring(module["drawing"](series, 18.0))
    space = "{http://www.w3.org/2000/svg}"
    dots = [(float(one.get("cx")), float(one.get("cy"))) for one in drawn.iter(f"{space}circle")]
    assert len(dots) == 3 + 1 + 2  # and one for each name
    line = [tuple(map(float, point.split(","))) for point in drawn.find(f"{space}polyline").get("points").split()]
    assert line == sorted(line) and line == sorted(line, key=lambda point: point[1]) and set(line) < set(dots)


def test_the_drawing_is_of_the_results():
    assert runpy.run_path(str(ROOT / "scripts" / "plot_sizes.py"))["main"](check=True) == 0
