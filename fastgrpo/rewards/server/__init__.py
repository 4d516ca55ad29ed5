"""The judge as a small OpenAI-compatible server: `python -m fastgrpo serve_judge`."""
