"""A run that is killed at any moment: it goes on, computes no finished block again, and ends in the same checkpoint."""

import pytest

BLOCKS = 3
WORK = """
    import fewbits
    from fewbits.methods.weights.gptq import Gptq
    from fewbits.methods.weights.rtn import Rtn
    from fewbits.pipeline.plan import Plan
    from fewbits.pipeline.stream import StreamOptions

    text = fewbits.TextSample(str(root / "text.txt"), 3, 16)

    def work(name):
        blocks = set()

        def progress(block, *_):
            blocks.add(block)
            (root / "seen").write_text(json.dumps(sorted(blocks)))

        (root / "seen").write_text("[]")
        options = StreamOptions(progress=progress)
        fewbits.compress(root / "model", PLAN, root / name, calibration=text, options=options, probe=None)

    def seen(name):
        return json.loads((root / "seen").read_text())
"""


def contents(folder):
    """Every file but the record and the card, which say how long the run took."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("fewbits.json", "README.md")}


PLAIN = "Gptq(bits=3, group_size=16)"
TABLES = f"Plan({PLAIN}, embeddings=Rtn(bits=8, group_size=16), head=Gptq(bits=4, group_size=16))"


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "step"), [(PLAIN, 13), (TABLES, 23)])
def test_a_run_killed_at_any_moment_ends_in_the_same_checkpoint(small_model, killed, plan, step):
    root = small_model(BLOCKS)
    events, _, kills = killed(root, WORK.replace("PLAN", plan), 5, step)
    assert events > 40
    expected = contents(root / "whole")
    for place, first, again in kills:
        # Nothing that was finished is computed again, and every block was computed by one of the two.
        assert not set(first) & set(again) and set(first) | set(again) >= set(range(BLOCKS)) - {max(first, default=-1) + 1}, place
        assert contents(root / f"killed{place}") == expected, place
        assert not (root / f"killed{place}.work").exists() and not (root / f"killed{place}.partial").exists(), place
