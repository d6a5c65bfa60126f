"""Code generation: from a graph, its packing and its schedule to instructions and image.

Wait tokens are not scheduled by hand. Every instruction is emitted with the memory ranges that it
reads and writes; the emitter finds the earlier instructions of other units that it depends on, and
tokens are allotted to them at the end.
"""

from .generate import generate, time_schedule

__all__ = ["generate", "time_schedule"]
