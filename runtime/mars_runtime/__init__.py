"""The MARS runtime: what a deployed program needs."""
