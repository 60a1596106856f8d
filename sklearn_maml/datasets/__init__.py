"""Task collections: small real ones shipped with the package, and an endless synthetic one."""

from ._loaders import load_omniglot, load_vowels, load_x264
from ._synthetic import SinusoidTasks, make_sinusoid_tasks

__all__ = [
    "SinusoidTasks",
    "load_omniglot",
    "load_vowels",
    "load_x264",
    "make_sinusoid_tasks",
]
