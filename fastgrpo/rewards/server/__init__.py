"""A server of the judge's model: `python -m fastgrpo serve_judge`."""
