"""A command: `python -m bench.dynamic_cost`."""

from bench.speed.dynamic_cost import main

if __name__ == "__main__":
    main()
