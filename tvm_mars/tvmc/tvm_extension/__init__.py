"""MARS for a tvmc that loads extensions: ``tvmc --experimental-tvm-extension DIR ...``.

``DIR`` is the directory that holds this package, ``python -m tvm_mars.tvmc --extension-directory``.
"""
