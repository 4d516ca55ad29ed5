"""One file a command of `python -m fastgrpo`; each has `main(argv) -> int`."""
