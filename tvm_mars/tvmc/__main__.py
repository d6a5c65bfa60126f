"""``python -m tvm_mars.tvmc``."""

from . import main

raise SystemExit(main())
