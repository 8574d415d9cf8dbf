from pathlib import Path

import pytest

from fewbits.core.record import machine, peak_memory, resident_memory, restart_peak_memory, versions


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts anew")
def test_the_peak_is_that_since_it_was_restarted():
    held = bytearray(b"x" * 200_000_000)
    high = peak_memory()
    assert high > 200_000_000 and resident_memory() > 200_000_000
    del held
    restart_peak_memory()
    assert peak_memory() < high - 150_000_000 and resident_memory() <= peak_memory()


def test_what_is_said_of_software_and_machine():
    assert versions().keys() == {"python", "fewbits", "torch", "transformers"} and machine()["threads"] >= 1
