"""An allocation that is killed at any moment: run again, it ends in the same recipe and the same weights."""

import pytest

WORK = """
    import fewbits
    from fewbits.mixed_precision import Request

    text = fewbits.TextSample(str(root / "text.txt"), 3, 16)

    def work(name):
        request = Request("4.6bpw", ("rtn:group_size=16",))
        fewbits.allocate(root / "model", request, root / name, calibration=text, heldout=text)
"""


@pytest.mark.slow
def test_an_allocation_killed_at_any_moment_ends_in_the_same_files(small_model, killed):
    root = small_model(2)
    events, _, kills = killed(root, WORK, 7, 40)
    assert events > 60
    for place, _, _ in kills:
        for name in ("recipe.toml", "model.safetensors", "config.json"):
            assert (root / f"killed{place}" / name).read_bytes() == (root / "whole" / name).read_bytes(), (place, name)
        assert not (root / f"killed{place}.work").exists(), place
