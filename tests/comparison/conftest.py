"""What the tests of comparisons run on: two blocks of the built-in model and a small text."""

import pytest

from fewbits.data.text import TextSample


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Calibration text and text to measure on, different ones."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"def function_{i}(x, y={i}):\n    '''Return x plus {i}.'''\n    return x + y * {i % 7}\n\n\n" for i in range(160)]
    (folder / "seen.txt").write_text("".join(lines[:80]))
    (folder / "held.txt").write_text("".join(lines[80:]))
    return TextSample(str(folder / "seen.txt"), 6, 48), TextSample(str(folder / "held.txt"), 12, 48)
