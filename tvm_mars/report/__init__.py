"""Reports: what a program costs, as values and as text."""

from .profile import LayerProfile, Profile, profile_program, repeated

__all__ = ["LayerProfile", "Profile", "profile_program", "repeated"]
