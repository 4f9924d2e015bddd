"""A command: `python -m bench.speed_ops`."""

from bench.speed.layers_gpu import main

if __name__ == "__main__":
    main()
