"""A comparison that is killed at any moment: it goes on, makes no finished run again, and ends in the same result files."""

import pytest

WORK = """
    import fewbits
    from fewbits.comparison.samples import Samples

    calibration, held = (fewbits.TextSample(str(root / f"{name}.txt"), 3, 16) for name in ("text", "held"))
    settings = fewbits.CompareSettings(repeats=2, samples=Samples(("def f",), 2), noise_windows=2)

    def work(name):
        methods = ["rtn:bits=3,group_size=16", "gptq:bits=3,group_size=16"]
        fewbits.compare(root / "model", methods, root / name, calibration=calibration, text=held, settings=settings)

    def seen(name):
        runs = [path for path in (root / name).glob("runs/*") if not path.name.endswith(".partial")]
        return {path.name: path.stat().st_ino for path in runs}
"""


def contents(folder):
    """Every file but those that say how long a run took."""
    timed = ("timing.json", "report.html", "table.md", "table.csv")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in timed]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_a_comparison_killed_at_any_moment_ends_in_the_same_files(small_model, killed):
    root = small_model(2)
    events, runs, kills = killed(root, WORK, 4, 41)
    expected = contents(root / "whole")
    assert events > 60 and len(runs) == 4
    assert "compare.json" in expected and any(name.startswith("shared/") for name in expected)
    for place, first, again in kills:
        assert first.items() <= again.items() and sorted(again) == sorted(runs), place  # a finished run is left as it is
        assert contents(root / f"killed{place}") == expected, place
    assert any(first for _, first, _ in kills)
