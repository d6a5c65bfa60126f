"""MARS for a tvmc that loads extensions: ``tvmc compile --experimental-tvm-extension DIR ...``.

``DIR`` is the directory that holds this package, which this prints::

    python -c "import tvm_mars.tvmc; print(*tvm_mars.tvmc.__path__)"

Upstream's releases between 0.10 and 0.19 have the option. There ``--target`` names TVM's own
target as well (``"mars, llvm"``), and holds the options of MARS and where to write the report
(``"mars -arch=mars-80b -dump-offloads=offloads.txt, llvm"``).
"""
