"""Neural networks, their caches and signals in few bits, and exactly what was lost."""

from fewbits.api import compress, evaluate, generate, load, train
from fewbits.comparison.compare import CompareSettings, compare
from fewbits.core.errors import FewbitsError, InputError, NumericsError
from fewbits.core.tensor import CompressedTensor, Term, Transform
from fewbits.data.text import TextSample
from fewbits.export.resize import resize
from fewbits.layers import parts as _parts  # noqa: F401 - makes what a folder holds known
from fewbits.mixed_precision import allocate
from fewbits.models import transformers_hook as _transformers_hook  # noqa: F401 - registers the folder format
from fewbits.reproduction import reproduce

__all__ = [
    "CompareSettings",
    "CompressedTensor",
    "FewbitsError",
    "InputError",
    "NumericsError",
    "Term",
    "TextSample",
    "Transform",
    "allocate",
    "compare",
    "compress",
    "evaluate",
    "generate",
    "load",
    "reproduce",
    "resize",
    "train",
]
