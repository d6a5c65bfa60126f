"""Reports: what a program costs, as values and as text."""

from .compression import Compression, compression
from .profile import LayerProfile, Profile, profile_program, repeated

__all__ = [
    "Compression",
    "LayerProfile",
    "Profile",
    "compression",
    "profile_program",
    "repeated",
]
