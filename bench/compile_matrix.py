"""A command: `python -m bench.compile_matrix`."""

from bench.gpu.compile_matrix import main

if __name__ == "__main__":
    raise SystemExit(main())
