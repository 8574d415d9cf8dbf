"""Start a method: its file, its test and its page; nothing else is touched.

    python scripts/new_method.py FAMILY NAME        (make new FAMILY=weights NAME=foo)

The new file rounds to nearest, so it runs at once; its test asks it to beat round-to-nearest, so it fails until it does.
"""

import argparse
import sys
from pathlib import Path
from string import Template

METHOD = Template('''"""$title: say the idea in a line."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.core.checks import check_range
from fewbits.core.method import LayerMethod, Paper, Statistics
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.ranges import fit_uniform, round_codes
from fewbits.formats.uniform import Uniform


@dataclass(frozen=True)
class $title(LayerMethod):
    """The idea, what is stored, departures from the paper, errors raised."""

    bits: int = 4

    paper: ClassVar[Paper] = Paper("title of the paper", "0000.00000", 2000)
    baseline: ClassVar[str | None] = "rtn"
    needs: ClassVar = ()

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        scales, zeros = fit_uniform(weight, self.bits)
        scales = scales.half()
        codes = round_codes(weight, scales.float(), zeros, self.bits).to(torch.uint8)
        return CompressedTensor((Uniform.from_codes(codes, scales, zeros.to(torch.uint8), bits=self.bits),))
''')

TEST = Template("""import torch

from fewbits.core.method import Statistics
from fewbits.methods.$family.$name import $title
from fewbits.methods.weights.rtn import Rtn


def test_it_beats_its_baseline_at_equal_bits():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    ours = $title(bits=3).compress(weight, Statistics())
    plain = Rtn(bits=3, group_size=None).compress(weight, Statistics())
    assert sum(ours.bits().values()) <= sum(plain.bits().values())
    assert (weight - ours.decode()).square().sum() < (weight - plain.decode()).square().sum()
""")

PAGE = Template("""# $name

The paper, the idea, what is stored, the fields, departures, what was measured, the paper's figures.
""")


def create(root: Path, family: str, name: str) -> list[Path]:
    """Write the three files; nothing is written where one of them exists or the name is no Python name."""
    if not (name.isidentifier() and family.isidentifier() and name == name.lower()):
        raise SystemExit(f"new: {family}/{name} cannot be a module; lower-case letters, digits and underscores would be right")
    files = {
        root / "src/fewbits/methods" / family / f"{name}.py": METHOD,
        root / "tests/methods" / family / f"test_{name}.py": TEST,
        root / "docs/methods" / family / f"{name}.md": PAGE,
    }
    if taken := [path for path in files if path.exists()]:
        raise SystemExit(f"new: {taken[0]} exists; another name would be right")
    package = root / "src/fewbits/methods" / family / "__init__.py"
    values = {"family": family, "name": name, "title": "".join(part.capitalize() for part in name.split("_"))}
    for path, template in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template.substitute(values))
    if not package.exists():
        package.write_text(f'"""Methods of the family {family}."""\n')
    return list(files)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family")
    parser.add_argument("name")
    arguments = parser.parse_args()
    for made in create(Path(__file__).parents[1], arguments.family, arguments.name):
        print(made, file=sys.stdout)
